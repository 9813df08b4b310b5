"""The stored result of an evaluation."""

import json
from dataclasses import dataclass, fields
from typing import Any

from model import storage
from model.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores and predictions of one evaluation, with everything that a report needs."""

    task: str
    model: str
    """URI of the evaluated model."""
    protocol: dict[str, str]
    """What the scores must be read with: split, clips, frames, precision; in a zero-shot one prompt and decoding."""
    pretrained: bool
    """Whether fine-tuning started from a pre-trained model."""
    scores: dict[str, float]
    untuned: dict[str, float]
    """Scores of the model before it was tuned; empty if it was not evaluated."""
    chance: dict[str, float]
    predictions: list[dict[str, Any]]
    class_names: list[str]
    headline: str
    """The score that the paper's tables lead with."""
    captions: list[tuple[str, str]]
    """(predicted, true) text of each clip, for display."""
    nearest_clips: list[list[int]]
    """For each text, the most similar clips, nearest first; empty for tasks without search."""


def save_evaluation(evaluation: Evaluation, uri: str) -> str:
    """Writes an evaluation as JSON; returns its URI."""
    storage.write(uri, json.dumps(vars(evaluation), ensure_ascii=False).encode())
    return uri


def load_evaluation(uri: str) -> Evaluation:
    """Reads a stored evaluation. Raises DataError if an earlier version wrote it."""
    tree = json.loads(storage.read(uri))
    if missing := {field.name for field in fields(Evaluation)} - tree.keys():
        raise DataError(f"{uri} must hold {', '.join(sorted(missing))}: an earlier version wrote it. Evaluate again.")
    return Evaluation(**{**tree, "captions": [(predicted, true) for predicted, true in tree["captions"]]})
