"""Video-text retrieval with a dual encoder: clips and texts of one row are each other's positives."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from model.data.loading.loader import Batch, Example
from model.mplug_video.modeling import MPlugVideoForRetrieval
from model.tasks.base import DecoderPass, Logs, Prediction, Task
from model.tasks.gathering import gather

MAX_WORDS = 80


class Retrieval(Task):
    model_class = MPlugVideoForRetrieval

    def collate(self, examples: list[Example]) -> Batch:
        ids, mask = self.encode_texts(examples, MAX_WORDS)
        return {
            "pixel_values": self.pixel_values(examples),
            "input_ids": ids,
            "attention_mask": mask,
            "match_ids": torch.tensor([_match_id(example) for example in examples]),
        }

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        rows, length = batch["input_ids"].shape
        return [DecoderPass(rows=rows, length=length, after_prefix=False)]

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        video = self.model.embed_video(batch["pixel_values"])
        text = self.model.embed_text(batch["input_ids"], batch["attention_mask"])
        return matching_loss(video, text, batch["match_ids"], self.model.temperature), {
            "temperature": self.model.temperature.detach()
        }

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        video = self.model.embed_video(batch["pixel_values"]).float()
        text = self.model.embed_text(batch["input_ids"], batch["attention_mask"]).float()
        return [
            {
                "video": annotation.video,
                "text": annotation.text,
                "video_embedding": video[row].tolist(),
                "text_embedding": text[row].tolist(),
            }
            for row, annotation in enumerate(batch["annotations"])
        ]


def matching_loss(video: Tensor, text: Tensor, match_ids: Tensor, temperature: Tensor) -> Tensor:
    """Soft cross entropies of clip -> text and text -> clip over all processes' rows.

    `video` and `text` are unit vectors (B, E); rows with equal ids share the target's mass.
    """
    same = (match_ids[:, None] == gather(match_ids)[None]).float()  # (B, all)
    targets = same / same.sum(dim=1, keepdim=True)
    video_to_text = (video @ gather(text).T).float() / temperature
    text_to_video = (text @ gather(video).T).float() / temperature
    return (F.cross_entropy(video_to_text, targets) + F.cross_entropy(text_to_video, targets)) / 2


def _match_id(example: Example) -> int:
    """A number that is equal for rows of the same clip, on every process."""
    return int.from_bytes(hashlib.sha256(example.annotation.video.encode()).digest()[:7])
