"""Category prediction: by the likelihood of each category name as an answer, and by a classification head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.config.schema import RunConfig
from model.data.loading.loader import Batch, Example
from model.data.shards.reader import read_dataset_info
from model.errors import ConfigError, DataError
from model.mplug_video.processing import clean_caption
from model.tasks.base import DecoderPass, Logs, Prediction, Predictions, Scores, Task

if TYPE_CHECKING:
    from model.mplug_video.modeling import MPlugVideoForClassification

PROMPT = "视频标题：{text} 视频类目："  # the prompt of the released models
PROMPT_RESERVE = 15  # characters by which the title is shortened, for the words of the prompt
MAX_WORDS = 80
ACCURACIES = (1, 5)
SOURCES = {"head_scores": "", "generation_scores": "generation_"}
"""Scores of a prediction, and the prefix of the metrics computed from them."""


class Classification(Task):
    architecture = "MPlugVideoForClassification"
    planned_classes = 45  # the paper's categories
    metrics = tuple(f"{prefix}top{k}" for prefix in SOURCES.values() for k in ACCURACIES)
    headline = "top1"

    @classmethod
    def class_names(cls, config: RunConfig) -> list[str]:
        names: list[str] = read_dataset_info(config.data.shards)["class_names"]
        if not names:
            raise ConfigError(f"data.shards must be a classification dataset, {config.data.shards} has no classes.")
        return names

    def _question(self, example: Example) -> str:
        title = clean_caption(example.annotation.text, MAX_WORDS)
        return PROMPT.format(text=title[: self.config.data.max_length - PROMPT_RESERVE])

    def _encode(self, examples: list[Example]) -> tuple[Batch, list[int]]:
        names = self.categories
        unknown = {example.annotation.label for example in examples} - set(names)
        if unknown:
            raise DataError(f"label must be one of the {len(names)} class names, got {sorted(unknown)}.")
        titles, mask = self.encode_texts(examples, MAX_WORDS)
        labels = [names.index(example.annotation.label) for example in examples]
        batch = {"frames": self.stack_frames(examples), "title_ids": titles, "title_mask": mask}
        return batch, labels

    def collate(self, examples: list[Example]) -> Batch:
        batch, labels = self._encode(examples)
        pairs = [(self._question(item), item.annotation.label) for item in examples]
        ids, loss_mask = self.processor.pairs(pairs, self.config.data.max_length)
        return {**batch, "labels": torch.tensor(labels), "input_ids": ids, "loss_mask": loss_mask}

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        batch, _ = self._encode(examples)
        names = self.categories
        pairs = [(self._question(item), name) for item in examples for name in names]
        ids, loss_mask = self.processor.pairs(pairs, self.config.data.max_length)
        shape = (len(examples), len(names), -1)
        return {
            **batch,
            "answer_ids": ids.view(shape),
            "answer_mask": loss_mask.view(shape),
            "annotations": [example.annotation for example in examples],
        }

    def example_batch(self, clips: int) -> Batch:
        return {"frames": self.example_frames(clips), **example_answers(self, clips)}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        return answer_and_head_passes(self, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        return answer_and_head_loss(self.model, self.model.encode_video(batch["pixel_values"]).prefix, batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        prefix = self.model.encode_video(batch["pixel_values"]).prefix
        head = self.model.classify(prefix, batch["title_ids"], batch["title_mask"])
        names = self.categories
        predictions = []
        for row, annotation in enumerate(batch["annotations"]):
            answers = batch["answer_ids"][row], batch["answer_mask"][row]
            predictions.append(
                {
                    "video": annotation.video,
                    "text": annotation.text,
                    "label": annotation.label,
                    "prediction": names[int(head[row].argmax())],
                    "generation_scores": self.model.score_answers(prefix[row, None], *answers).float().tolist(),
                    "head_scores": head[row].float().tolist(),
                }
            )
        return predictions

    @staticmethod
    def score(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """Top-1 and top-5 accuracy of the head, and of the answer likelihoods (`generation_`)."""
        labels = np.array([class_names.index(prediction["label"]) for prediction in predictions])
        scores: Scores = {}
        for source, prefix in SOURCES.items():
            found = accuracies(np.array([prediction[source] for prediction in predictions]), labels)
            scores |= {prefix + name: value for name, value in found.items()}
        return scores

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        return {f"{prefix}top{k}": min(k / len(class_names), 1) for prefix in SOURCES.values() for k in ACCURACIES}

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return [(row["prediction"], row["label"]) for row in predictions]


def accuracies(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> Scores:
    """Top-1 and top-5 accuracy of class scores (clips, classes)."""
    ranks = (-scores).argsort(axis=1, kind="stable")
    return {f"top{k}": float((ranks[:, :k] == labels[:, None]).any(axis=1).mean()) for k in ACCURACIES}


def answer_and_head_loss(model: "MPlugVideoForClassification", prefix: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
    """The loss of the tokens of the answer, plus that of the head, which reads prefix + title in a second pass."""
    mask = batch["loss_mask"]
    generation = model.token_losses(prefix, batch["input_ids"], mask).sum() / mask.sum()
    logits = model.classify(prefix, batch["title_ids"], batch["title_mask"]).float()
    head = F.cross_entropy(logits, batch["labels"])
    return generation + head, {"loss_generation": generation.detach(), "loss_head": head.detach()}


def answer_and_head_passes(task: Task, batch: Batch) -> list[DecoderPass]:
    return [task.read_by_decoder(batch["input_ids"], batch["loss_mask"]), task.read_by_decoder(batch["title_ids"])]


def example_answers(task: Task, rows: int) -> Batch:
    """The texts and labels of `example_batch`, with `rows` rows, for head and answers."""
    ids = torch.ones(rows, task.config.data.max_length, dtype=torch.long)
    texts = {"input_ids": ids, "loss_mask": ids[:, 1:], "title_ids": ids, "title_mask": ids}
    return {**texts, "labels": torch.zeros(rows, dtype=torch.long)}
