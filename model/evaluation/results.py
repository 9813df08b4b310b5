"""The stored result of an evaluation: FOLDER/scores.json and FOLDER/predictions.jsonl."""

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from model import storage
from model.errors import DataError
from model.evaluation.bootstrap import Interval
from model.tasks.metrics import Measures, Prediction, confusion_matrix

UNRELIABLE = "unreliable"
"""Entry of a protocol whose scores must not decide anything, with the reason."""
EVALUATION = "evaluation"
"""Tag of a run in MLflow and of a registered version: the URI of the evaluation."""
SCORES, PREDICTIONS = "scores.json", "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores and predictions of one evaluation, with everything that a report needs."""

    task: str
    model: str
    """URI of the evaluated model."""
    shards: str
    """URI of the sharded benchmark."""
    protocol: dict[str, str]
    """What the scores must be read with: data, split, clips, frames, precision, prompt, decoding, rules."""
    pretrained: bool
    """Whether fine-tuning started from a pre-trained model."""
    scores: dict[str, float]
    intervals: dict[str, Interval]
    """95 % confidence interval of each score."""
    untuned: dict[str, float]
    """Scores of the model before it was tuned; empty if it was not evaluated."""
    chance: dict[str, float]
    class_names: list[str]
    headline: str
    """The score that the paper's tables lead with."""
    predictions: list[Prediction]
    """One for each row of the split, in its order, with `measures`, `shown` and the frames that were read."""

    @property
    def protocol_line(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.protocol.items())

    @property
    def videos(self) -> list[str]:
        """The clip of each prediction."""
        return [row["video"] for row in self.predictions]

    @property
    def measures(self) -> Measures:
        names = dict.fromkeys(name for row in self.predictions for name in row["measures"])
        return {name: np.array([row["measures"].get(name, np.nan) for row in self.predictions]) for name in names}

    @property
    def confusion(self) -> list[list[int]]:
        """Clips by true (rows) and predicted category; empty for tasks without categories."""
        if not (self.class_names and "label" in self.predictions[0]):
            return []
        return confusion_matrix(self.predictions, self.class_names)

    @property
    def captions(self) -> list[tuple[str, str]]:
        """(predicted, true) text of each prediction, for display."""
        return [(row["shown"]["predicted"], row["shown"]["true"]) for row in self.predictions]


def save_evaluation(evaluation: Evaluation, folder: str) -> str:
    """Writes an evaluation, the scores last; returns the URI of the folder."""
    facts = {key: value for key, value in vars(evaluation).items() if key != "predictions"}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions)
    storage.write(storage.join(folder, PREDICTIONS), lines.encode())
    storage.write(storage.join(folder, SCORES), json.dumps(facts, ensure_ascii=False, indent=1).encode())
    return folder


def load_evaluation(folder: str) -> Evaluation:
    """Reads a stored evaluation. Raises DataError if an earlier version wrote it."""
    tree: dict[str, Any] = json.loads(storage.read(storage.join(folder, SCORES)))
    wanted = {field.name for field in fields(Evaluation)} - {"predictions"}
    if missing := wanted - tree.keys():
        raise DataError(
            f"{folder} must hold {', '.join(sorted(missing))}: an earlier version wrote it. Evaluate again."
        )
    lines = storage.read(storage.join(folder, PREDICTIONS)).decode().rstrip("\n").split("\n")
    tree["intervals"] = {name: (low, high) for name, (low, high) in tree["intervals"].items()}
    return Evaluation(**tree, predictions=[json.loads(line) for line in lines])
