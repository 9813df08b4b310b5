"""Video-text retrieval with a dual encoder: the clip and the text of a row are a positive pair."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.data.loading.loader import Batch, Example
from model.tasks import metrics
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.gathering import gather
from model.tasks.metrics import Measures, Prediction, Predictions, Scores, Similarities

MAX_WORDS = 80


class Retrieval(Task):
    architecture = "MPlugVideoForRetrieval"
    metrics = metrics.RECALL_METRICS
    headline = "text_to_video_r1"

    @property
    def protocol(self) -> dict[str, str]:
        return {"similarity": "cosine, no dual softmax", **metrics.SEARCH_PROTOCOL}

    def collate(self, examples: list[Example]) -> Batch:
        ids, mask = self.encode_texts(examples, MAX_WORDS)
        return {
            "frames": self.stack_frames(examples),
            "input_ids": ids,
            "attention_mask": mask,
            "match_ids": torch.tensor([_match_id(example) for example in examples]),
        }

    def example_batch(self, clips: int) -> Batch:
        ids = torch.ones(clips, self.config.data.max_length, dtype=torch.long)
        rows = {"input_ids": ids, "attention_mask": ids, "match_ids": torch.arange(clips)}
        return {"frames": self.example_frames(clips), **rows}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        rows, length = batch["input_ids"].shape
        return [DecoderPass(rows=rows, length=length, after_prefix=False)]

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        video = self.model.embed_video(batch["pixel_values"])
        text = self.model.embed_text(batch["input_ids"], batch["attention_mask"])
        temperature = self.model.temperature
        return matching_loss(video, text, batch["match_ids"], temperature), {"temperature": temperature.detach()}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        video = self.model.embed_video(batch["pixel_values"]).float()
        text = self.model.embed_text(batch["input_ids"], batch["attention_mask"]).float()
        return [
            {
                "video": annotation.video,
                "text": annotation.text,
                "video_embedding": video[row].cpu().numpy(),
                "text_embedding": text[row].cpu().numpy(),
            }
            for row, annotation in enumerate(batch["annotations"])
        ]

    @staticmethod
    def finish(predictions: list[Prediction]) -> list[Prediction]:
        """Replaces the embeddings by ranks. The similarities of all pairs are never in memory together."""
        return list(metrics.ranked(predictions, *similarities(predictions)))

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """Ranks from text to video and back, from which recall at 1, 5 and 10 and mean and median rank follow."""
        return metrics.rank_measures(predictions)

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        return metrics.recall_chance(predictions)

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return metrics.nearest_texts(predictions)


def similarities(predictions: Predictions) -> tuple[Similarities, Similarities]:
    """The cosines of texts with all clips, and of clips with all texts, from their unit vectors."""
    videos, texts = (np.stack([row[f"{kind}_embedding"] for row in predictions]) for kind in ("video", "text"))
    return (lambda block: texts[block] @ videos.T), (lambda block: videos[block] @ texts.T)


def matching_loss(video: Tensor, text: Tensor, match_ids: Tensor, temperature: Tensor) -> Tensor:
    """Mean cross entropy with soft targets of clip -> text and text -> clip, over the rows of all processes.

    `video` and `text` are unit vectors (B, E); rows with equal ids share the target probability equally.
    """
    same = (match_ids[:, None] == gather(match_ids)[None]).float()  # (B, all)
    targets = same / same.sum(dim=1, keepdim=True)
    video_to_text = (video @ gather(text).T).float() / temperature
    text_to_video = (text @ gather(video).T).float() / temperature
    return (F.cross_entropy(video_to_text, targets) + F.cross_entropy(text_to_video, targets)) / 2


def _match_id(example: Example) -> int:
    """A number that is equal for all rows of a clip, on all processes."""
    return int.from_bytes(hashlib.sha256(example.annotation.video.encode()).digest()[:7])
