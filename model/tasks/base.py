"""The interfaces of evaluations and of objectives. Both are given their network, which model/tasks/build.py builds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from model.config.schema import RunConfig
from model.data.annotations import Annotation
from model.data.loading.loader import Batch, Example
from model.errors import ConfigError
from model.mplug_video.processing import clean_caption
from model.tasks import metrics
from model.tasks.metrics import Measures, Prediction, Predictions, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logs = dict[str, Tensor]
"""Scalars of one step, by metric name, kept on the device until they are logged."""


@dataclass(frozen=True, kw_only=True)
class DecoderPass:
    """One pass of the decoder in a training step, for counting operations."""

    rows: int
    length: int
    """Tokens per row, including visual prefix and padding."""
    scored: int = 0
    """Number of tokens with logits, in all rows."""
    after_prefix: bool = True
    """Whether the rows start with the visual prefix, which receives a gradient."""


@dataclass(frozen=True, kw_only=True)
class VisionPass:
    """Clips, or images as clips of one frame, that the vision encoder reads in a training step."""

    clips: int
    frames: int
    """Frames per clip."""


class Evaluator(ABC):
    """Scores a model on a split: from examples to predictions, and from them to metrics."""

    reads_video: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics that `score` returns. A task without metrics is only evaluated by its loss."""
    headline: ClassVar[str] = ""
    """The main metric in the tables of the paper (arXiv 2306.04362, tables 3 to 5)."""

    def __init__(self, config: RunConfig, model: "PreTrainedModel", processor: Any) -> None:
        """`processor` is that of the model's family."""
        self.config, self.model, self.processor = config, model, processor
        self.categories: list[str] = list(getattr(model.config, "class_names", None) or [])

    def __getstate__(self) -> dict[str, Any]:
        """The part that loader processes receive: enough to collate, without weights."""
        return {name: value for name, value in self.__dict__.items() if name not in {"model", "network"}}

    @property
    def protocol(self) -> dict[str, str]:
        """How a model is asked, which scores must be read with; complete after `read_split`."""
        return {}

    @abstractmethod
    def collate_evaluation(self, examples: list[Example]) -> Batch:
        """Evaluation batch, which also contains the annotations."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Prediction]:
        """One prediction per clip of an evaluation batch with normalised pixels."""

    def read_split(self, annotations: list[Annotation]) -> None:  # noqa: B027  # most tasks need none
        """Receives all annotations of a split before its first batch, for tasks that compare clips with all texts."""

    @staticmethod
    def finish(predictions: list[Prediction]) -> list[Prediction]:
        """Completes the predictions of a whole split by what compares clips with each other, in JSON types."""
        return predictions

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """The measures of finished predictions, from which the metrics follow."""
        return {}

    @classmethod
    def score(cls, predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """The metrics of a split."""
        return metrics.score(cls.measure(predictions, class_names))

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """The scores of guessing; empty for metrics without a chance level."""
        return {}

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        """(predicted, true) text of each clip, for display."""
        return []

    def normalize(self, batch: Batch) -> Batch:
        """Replaces `frames` by `pixel_values` (B, C, T, H, W) float32, computed on the device of the frames."""
        rest = {name: value for name, value in batch.items() if name != "frames"}
        return {**rest, "pixel_values": self.processor.normalize(batch["frames"])} if "frames" in batch else rest

    @staticmethod
    def stack_frames(examples: list[Example]) -> Tensor:
        """The clips of the examples, uint8 (B, T, H, W, C)."""
        return torch.stack([example.clip for example in examples])


class Task(Evaluator):
    """An objective with its network and processor. The engine trains `network`."""

    architecture: ClassVar[str] = ""
    """Class of the model that the task trains; empty: only the decoder."""
    planned_classes: ClassVar[int] = 0
    """Outputs of the classification head for planning, before the dataset exists."""

    def __init__(self, config: RunConfig, model: "PreTrainedModel", processor: Any) -> None:
        super().__init__(config, model, processor)
        self.network = TaskNetwork(self)

    @classmethod
    def class_names(cls, config: RunConfig) -> list[str] | None:
        """The classes of the task's head, if it has one."""
        return None

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Training batch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """The loss to minimise, and its parts, for a batch with normalised pixels."""

    @abstractmethod
    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        """The passes of the decoder that the loss of a batch needs."""

    def vision_passes(self, batch: Batch) -> list[VisionPass]:
        """The clips that the loss of a batch reads."""
        frames = batch["frames"] if self.reads_video else None
        return [] if frames is None else [VisionPass(clips=len(frames), frames=frames.shape[1])]

    @abstractmethod
    def example_batch(self, clips: int) -> Batch:
        """A training batch with the largest possible shapes, for planning."""

    def save(self, folder: Path) -> None:
        """Writes weights, configuration and processor, in the format of transformers."""
        self.model.save_pretrained(folder)
        (self.processor if self.reads_video else self.processor.tokenizer).save_pretrained(folder)

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        return {**self.collate(examples), "annotations": [example.annotation for example in examples]}

    def predict(self, batch: Batch) -> list[Prediction]:
        raise ConfigError(f"task {self.config.task} has no evaluation. Fine-tune a task that has one.")

    def example_frames(self, clips: int) -> Tensor:
        """Frames for `example_batch`: an expanded view of one element, which needs no memory."""
        vision = self.config.model.vision
        shape = (clips, vision.num_frames, vision.image_size, vision.image_size, 3)
        return torch.zeros(1, dtype=torch.uint8).expand(shape)

    def encode_texts(self, examples: list[Example], max_words: int) -> tuple[Tensor, Tensor]:
        """Token IDs and attention mask (B, L) of the cleaned texts of the examples."""
        texts = [clean_caption(example.annotation.text, max_words) for example in examples]
        return self.processor.texts(texts, self.config.data.max_length)

    def read_by_decoder(self, ids: Tensor, scored: Tensor | None = None) -> DecoderPass:
        """A decoder pass over texts (B, L) after the visual prefix, with logits where `scored` is 1."""
        length = self.model.config.num_queries + ids.shape[1]
        return DecoderPass(rows=len(ids), length=length, scored=0 if scored is None else int(scored.sum()))


class TaskNetwork(nn.Module):
    """The loss of a task as a module, so that engines that wrap `forward` (ZeRO, DDP) see all uses of parameters."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.normalize, self.task_loss, self.task_predict = task.normalize, task.loss, task.predict

    def forward(self, batch: Batch, predict: bool = False) -> tuple[Tensor, Logs] | list[Prediction]:
        batch = self.normalize(batch)
        return self.task_predict(batch) if predict else self.task_loss(batch)
