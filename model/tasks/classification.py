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
from model.tasks import metrics
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.metrics import Measures, Prediction, Predictions, Scores

if TYPE_CHECKING:
    from model.mplug_video.modeling import MPlugVideoForClassification

PROMPT = "视频标题：{text} 视频类目："  # the prompt of the released models
PROMPT_RESERVE = 15  # characters by which the title is shortened, for the words of the prompt
MAX_WORDS = 80
SOURCES = {"head_scores": "", "generation_scores": "generation_"}
"""Scores of a prediction, and the prefix of the metrics computed from them."""


class Classification(Task):
    architecture = "MPlugVideoForClassification"
    planned_classes = 45  # the paper's categories
    metrics = tuple(f"{prefix}top{k}" for prefix in SOURCES.values() for k in metrics.ACCURACIES)
    headline = "top1"

    @classmethod
    def class_names(cls, config: RunConfig) -> list[str]:
        names: list[str] = read_dataset_info(config.data.shards)["class_names"]
        if not names:
            raise ConfigError(f"data.shards must be a classification dataset, {config.data.shards} has no classes.")
        return names

    @property
    def protocol(self) -> dict[str, str]:
        way = "mean" if self.model.config.mean_answer_scores else "sum"
        return {"prompt_text": PROMPT, "likelihood": f"{way} of the tokens of a category", "head": "prefix and title"}

    def _question(self, example: Example) -> str:
        return PROMPT.format(text=self._title(example)[: self.config.data.max_length - PROMPT_RESERVE])

    def _title(self, example: Example) -> str:
        return clean_caption(example.annotation.text, MAX_WORDS)

    def _validate_labels(self, examples: list[Example]) -> None:
        if unknown := {example.annotation.label for example in examples} - set(self.categories):
            raise DataError(f"label must be one of the {len(self.categories)} class names, got {sorted(unknown)}.")

    def collate(self, examples: list[Example]) -> Batch:
        self._validate_labels(examples)
        titles, mask = self.encode_texts(examples, MAX_WORDS)
        pairs = [(self._question(item), item.annotation.label) for item in examples]
        ids, loss_mask = self.processor.pairs(pairs, self.config.data.max_length)
        labels = [self.categories.index(example.annotation.label) for example in examples]
        frames = self.stack_frames(examples)
        texts = {"title_ids": titles, "title_mask": mask, "input_ids": ids, "loss_mask": loss_mask}
        return {"frames": frames, **texts, "labels": torch.tensor(labels)}

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        self._validate_labels(examples)
        length = self.config.data.max_length
        choices = [self.processor.choices(self._question(item), self.categories, length) for item in examples]
        return {
            "frames": self.stack_frames(examples),
            "titles": [[ids] for ids in self.processor.sentences(list(map(self._title, examples)), length)],
            "answers": [rows for rows, _ in choices],
            "answer_starts": [starts for _, starts in choices],
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
        prefixes = self.model.read_prefixes(self.model.encode_video(batch["pixel_values"]).prefix)
        head = self.model.classify_texts(prefixes, batch["titles"])[:, 0]
        answers = self.model.score_answers(prefixes, batch["answers"], batch["answer_starts"])
        return [
            {
                "video": annotation.video,
                "text": annotation.text,
                "label": annotation.label,
                "prediction": self.categories[int(head[row].argmax())],
                "generation_scores": answers[row].tolist(),
                "head_scores": head[row].float().tolist(),
            }
            for row, annotation in enumerate(batch["annotations"])
        ]

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """Top-1 and top-5 accuracy of the head, and of the answer likelihoods (`generation_`)."""
        labels = label_numbers(predictions, class_names)
        found: Measures = {}
        for source, prefix in SOURCES.items():
            found |= metrics.top_measures(metrics.column(predictions, source), labels, prefix)
        return found

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        levels = {k: min(k / len(class_names), 1) for k in metrics.ACCURACIES}
        return {f"{prefix}top{k}": level for prefix in SOURCES.values() for k, level in levels.items()}

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return [(row["prediction"], row["label"]) for row in predictions]


def label_numbers(predictions: Predictions, class_names: Sequence[str]) -> NDArray[np.int64]:
    return np.array([class_names.index(prediction["label"]) for prediction in predictions])


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
