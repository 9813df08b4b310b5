"""Retrieval in two stages: a dual encoder finds candidates for each query, and a matching model orders the best anew.

Comparing all pairs with the matching model takes time quadratic in the gallery: 100 million passes for 10,000 clips.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.config.schema import RunConfig
from model.data.loading.loader import Batch
from model.tasks import metrics
from model.tasks.matching import Matching
from model.tasks.metrics import Measures, Prediction, Predictions, Similarities
from model.tasks.retrieval import Retrieval, similarities

ABOVE_ALL = 10.0
"""Added to a probability, so that every candidate ranks before the rest, whose cosines are at most 1."""


class Reranking(Matching):
    """Scores the candidates of a first stage by the head of a matching model."""

    metrics = metrics.RECALL_METRICS
    headline = Retrieval.headline

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        processor: Any,
        first: list[Prediction],
        top_k: int,
        protocol: dict[str, str],
    ) -> None:
        """`first` are the predictions of a Retrieval task for all rows of the split, and `protocol` is that task's."""
        super().__init__(config, model, processor)
        self.first, self.top_k, self.first_protocol = first, top_k, protocol
        self.best_clips, self.best_texts = candidates(first, top_k)
        wanted: list[set[int]] = [set(own) for own in self.best_texts.tolist()]  # for each clip, the texts to compare
        for text, found in enumerate(self.best_clips.tolist()):
            for clip in found:
                wanted[clip].add(text)
        self.wanted = [sorted(own) for own in wanted]

    @property
    def protocol(self) -> dict[str, str]:
        again = f"the best {self.top_k} by the head of {self.config.model.init_from}"
        return {**self.first_protocol, "reranking": again, "matching_prompt": super().protocol["prompt_text"]}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        visual, predictions = self.model.encode_video(batch["pixel_values"]).prefix, []
        for row, position in enumerate(batch["positions"]):
            texts = [self.titles[text] for text in self.wanted[position]]
            head = self.model.classify_texts(self.model.read_prefixes(visual[row, None]), [texts])[0]
            found = head.float().softmax(dim=1)[:, 1].cpu().numpy()
            best = {"best_clips": self.best_clips[position], "best_texts": self.best_texts[position]}
            own = {"candidates": self.wanted[position], "head_scores": found}
            predictions.append({**self.first[position], **best, **own})
        return predictions

    @staticmethod
    def finish(predictions: list[Prediction]) -> list[Prediction]:
        clips, texts = (np.stack([row[f"best_{kind}"] for row in predictions]) for kind in ("clips", "texts"))
        scores = [dict(zip(row["candidates"], row["head_scores"], strict=True)) for row in predictions]  # by clip
        to_video, to_text = similarities(predictions)
        ways = (
            _above(to_video, clips, lambda text, clip: scores[clip][text]),
            _above(to_text, texts, lambda clip, text: scores[clip][text]),
        )
        return list(metrics.ranked(predictions, *ways))

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        return Retrieval.measure(predictions, class_names)

    captions = staticmethod(Retrieval.captions)


def candidates(predictions: Predictions, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The most similar clips of each text, and the most similar texts of each clip, (rows, top_k)."""
    videos = [row["video"] for row in predictions]
    clips, texts = (metrics.rank_matches(way, videos, top_k)[1] for way in similarities(predictions))
    return clips, texts


def _above(way: Similarities, found: NDArray[np.int64], score: Any) -> Similarities:
    """Similarities in which the items `found` for each query come first, by the matching model's score."""

    def similarity(block: slice) -> NDArray[np.float32]:
        values = way(block)
        for row, query in enumerate(range(len(found))[block]):
            items = found[query].tolist()
            values[row, items] = [ABOVE_ALL + score(query, item) for item in items]
        return values

    return similarity
