"""What every objective provides. A task is given its network: model/tasks/build.py makes it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from model.config.schema import RunConfig
from model.data.annotations import Annotation
from model.data.loading.loader import Batch, Example
from model.errors import ConfigError
from model.mplug_video.processing import MPlugVideoProcessor, clean_caption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prediction = dict[str, Any]
"""One evaluated clip, ready for JSON: `video`, and what the task adds."""
Predictions = Sequence[Prediction]
Scores = dict[str, float]
"""Metrics by name."""
Logs = dict[str, Tensor]
"""Scalars of one step, by metric name, kept on the device until they are logged."""


@dataclass(frozen=True, kw_only=True)
class DecoderPass:
    """What the decoder reads in one pass of a training step, for counting operations."""

    rows: int
    length: int
    """Tokens per row, visual prefix and padding included."""
    scored: int = 0
    """Tokens of all rows that have logits."""
    after_prefix: bool = True
    """Whether the rows begin with the visual prefix, to which the gradient goes."""


class Task(ABC):
    """An objective with its network and processor. The engine trains `network`."""

    reads_video: ClassVar[bool] = True
    architecture: ClassVar[str] = ""
    """Class of model.mplug_video that the task trains; empty: the decoder alone."""
    planned_classes: ClassVar[int] = 0
    """Outputs of the classification head while the dataset is not there yet."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """Names of what `score` returns. A task without metrics has no evaluation beside its loss."""
    headline: ClassVar[str] = ""
    """The metric that the paper's tables lead with (arXiv 2306.04362, tables 3 to 5)."""

    def __init__(self, config: RunConfig, model: "PreTrainedModel", processor: MPlugVideoProcessor) -> None:
        self.config, self.model, self.processor = config, model, processor
        self.categories: list[str] = list(getattr(model.config, "class_names", None) or [])
        self.network = TaskNetwork(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a loader process gets of a task: enough to collate, and no weights."""
        return {name: value for name, value in self.__dict__.items() if name not in {"model", "network"}}

    @classmethod
    def class_names(cls, config: RunConfig) -> list[str] | None:
        """The classes of the task's head, if it has one."""
        return None

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Training batch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """The loss to minimise and its parts, of a batch with normalised pixels."""

    @abstractmethod
    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        """What the decoder reads to make the loss of a batch."""

    @abstractmethod
    def example_batch(self, clips: int) -> Batch:
        """A training batch of the largest shapes that occur, for planning."""

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        """Evaluation batch; holds the annotations as well."""
        return {**self.collate(examples), "annotations": [example.annotation for example in examples]}

    def read_split(self, annotations: list[Annotation]) -> None:  # noqa: B027  # most tasks need none
        """Sees all of a split before its first batch, for tasks that compare clips with the texts of others."""

    def predict(self, batch: Batch) -> list[Prediction]:
        """One prediction per clip of an evaluation batch with normalised pixels."""
        raise ConfigError(f"task {self.config.task} has no evaluation. Fine-tune a task that has one.")

    @staticmethod
    def score(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """The metrics of a split."""
        return {}

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """What guessing scores; empty where there is no such level."""
        return {}

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        """(predicted, true) text of each clip, as people are shown it."""
        return []

    @staticmethod
    def nearest_clips(predictions: Predictions, count: int) -> list[list[int]]:
        """Of each text, the clips that are most similar to it, the nearest first; empty for tasks without search."""
        return []

    def stack_frames(self, examples: list[Example]) -> Tensor:
        """The examples' clips as they were decoded, uint8 (B, T, H, W, C)."""
        return torch.stack([example.clip for example in examples if example.clip is not None])

    def example_frames(self, clips: int) -> Tensor:
        """Frames for `example_batch`: a view of one number, which needs no memory."""
        vision = self.config.model.vision
        shape = (clips, vision.num_frames, vision.image_size, vision.image_size, 3)
        return torch.zeros(1, dtype=torch.uint8).expand(shape)

    def normalize(self, batch: Batch) -> Batch:
        """The batch with `pixel_values` (B, C, T, H, W) float32 in place of `frames`, made on their device."""
        rest = {name: value for name, value in batch.items() if name != "frames"}
        return {**rest, "pixel_values": self.processor.normalize(batch["frames"])} if "frames" in batch else rest

    def encode_texts(self, examples: list[Example], max_words: int) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, L) of the examples' cleaned texts."""
        texts = [clean_caption(example.annotation.text, max_words) for example in examples]
        return self.processor.texts(texts, self.config.data.max_length)

    def read_by_decoder(self, ids: Tensor, scored: Tensor | None = None) -> DecoderPass:
        """A pass over texts (B, L) after the visual prefix, with logits where `scored` is 1."""
        length = self.model.config.num_queries + ids.shape[1]
        return DecoderPass(rows=len(ids), length=length, scored=0 if scored is None else int(scored.sum()))


class TaskNetwork(nn.Module):
    """A task's loss as a module, so that an engine that wraps `forward` (ZeRO, DDP) sees every parameter's use."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.normalize, self.task_loss, self.task_predict = task.normalize, task.loss, task.predict

    def forward(self, batch: Batch, predict: bool = False) -> tuple[Tensor, Logs] | list[Prediction]:
        batch = self.normalize(batch)
        return self.task_predict(batch) if predict else self.task_loss(batch)
