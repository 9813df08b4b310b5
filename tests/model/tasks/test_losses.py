"""Compares contrastive losses with loops over single pairs."""

import math

import torch
from torch.nn import functional as F

from model.tasks.pretraining import contrastive_loss
from model.tasks.retrieval import matching_loss


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def test_the_contrastive_loss_uses_the_nearest_query() -> None:
    video, text, temperature = unit(4, 3, 8), unit(4, 8), torch.tensor([0.1])
    losses = []
    for sims in (
        [[max(float(q @ text[c]) for q in video[b]) / 0.1 for c in range(4)] for b in range(4)],
        [[max(float(text[b] @ q) for q in video[c]) / 0.1 for c in range(4)] for b in range(4)],
    ):
        for row, values in enumerate(sims):
            log_z = math.log(sum(math.exp(value) for value in values))
            targets = [0.1 / 4 + (0.9 if column == row else 0.0) for column in range(4)]
            losses.append(sum(t * (log_z - v) for t, v in zip(targets, values, strict=True)))
    torch.testing.assert_close(contrastive_loss(video, text, temperature), torch.tensor(sum(losses) / 8))


def test_rows_of_the_same_clip_share_the_target() -> None:
    video, text, ids = unit(3, 8), unit(3, 8), torch.tensor([5, 5, 9])
    losses = []
    for first, second in ((video, text), (text, video)):
        for row in range(3):
            sims = [float(first[row] @ second[column]) / 0.2 for column in range(3)]
            log_z = math.log(sum(math.exp(value) for value in sims))
            positives = [column for column in range(3) if ids[column] == ids[row]]
            losses.append(sum(log_z - sims[column] for column in positives) / len(positives))
    found = matching_loss(video, text, ids, torch.tensor([0.2]))
    torch.testing.assert_close(found, torch.tensor(sum(losses) / 6))
