"""The result of an evaluation, as it is stored."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import storage


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one evaluation found, and all that a report needs."""

    task: str
    model: str
    """URI of the model that was judged."""
    pretrained: bool
    """Whether fine-tuning started from a pre-trained model."""
    scores: dict[str, float]
    chance: dict[str, float]
    predictions: list[dict[str, Any]]
    class_names: list[str]

    def captions(self) -> list[tuple[str, str]]:
        """(predicted, true) text of each clip; for retrieval and matching the nearest text of the split."""
        rows = self.predictions
        if self.task in ("matching", "retrieval"):
            nearest = self._similarities().argmax(axis=1).tolist()
            return [(rows[found]["text"], row["text"]) for row, found in zip(rows, nearest, strict=True)]
        truth = "label" if self.task == "classification" else "references"
        return [(row["prediction"], _first(row[truth])) for row in rows]

    def _similarities(self) -> NDArray[np.float64]:
        """Of each clip with each text of the split."""
        if self.task == "matching":
            return np.array([row["head_scores"] for row in self.predictions])
        videos, texts = (np.array([row[f"{kind}_embedding"] for row in self.predictions]) for kind in ("video", "text"))
        return videos @ texts.T

    def nearest_clips(self, count: int) -> list[list[int]]:
        """Of each text, the clips that are most similar to it, the nearest first."""
        found: list[list[int]] = (-self._similarities().T).argsort(axis=1, kind="stable")[:, :count].tolist()
        return found


def save_evaluation(evaluation: Evaluation, uri: str) -> str:
    """Writes an evaluation as JSON; returns its URI."""
    storage.write(uri, json.dumps(vars(evaluation), ensure_ascii=False).encode())
    return uri


def load_evaluation(uri: str) -> Evaluation:
    return Evaluation(**json.loads(storage.read(uri)))


def _first(value: str | list[str]) -> str:
    return value if isinstance(value, str) else value[0]
