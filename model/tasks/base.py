"""What every objective provides, and how its networks are built."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from model import manifest
from model.config.schema import RunConfig, VisionConfig
from model.data.annotations import Annotation
from model.data.loading.loader import Batch, Example
from model.data.shards.reader import read_dataset_info
from model.errors import ConfigError
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.mplug_video.modeling import decoder_config
from model.mplug_video.processing import MPlugVideoProcessor, clean_caption
from model.mplug_video.tokenization import with_special_tokens
from model.mplug_video.vision import TimeSformer

Prediction = dict[str, Any]
"""One evaluated clip, ready for JSON: `video`, and what the task adds."""
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


FRESH_HEADS = ("vision_proj.", "text_proj.", "temperature", "classifier.")
"""Parameters that a task may add to the model it starts from. Any other missing weight is an error."""


class Task(ABC):
    """An objective with its network and processor. `network` is what the engine trains."""

    reads_video: ClassVar[bool] = True
    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model, self.processor = self.build()
        self.categories: list[str] = list(getattr(self.model.config, "class_names", None) or [])
        self.network = TaskNetwork(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a loader process gets of a task: enough to collate, and no weights."""
        return {name: value for name, value in self.__dict__.items() if name not in {"model", "network"}}

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Training batch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """The loss to minimise and its parts."""

    @abstractmethod
    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        """What the decoder reads to make the loss of a batch."""

    def read_by_decoder(self, ids: Tensor, scored: Tensor | None = None) -> DecoderPass:
        """A pass over texts (B, L) after the visual prefix, with logits where `scored` is 1."""
        length = self.model.config.num_queries + ids.shape[1]
        return DecoderPass(rows=len(ids), length=length, scored=0 if scored is None else int(scored.sum()))

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        """Evaluation batch; holds the annotations as well."""
        return {**self.collate(examples), "annotations": [example.annotation for example in examples]}

    def read_split(self, annotations: list[Annotation]) -> None:  # noqa: B027  # most tasks need none
        """Sees all of a split before its first batch, for tasks that compare clips with the texts of others."""

    @property
    def predicts(self) -> bool:
        """Whether the task has an evaluation beside its loss."""
        return type(self).predict is not Task.predict

    def predict(self, batch: Batch) -> list[Prediction]:
        """One prediction per clip of an evaluation batch."""
        raise ConfigError(f"task {self.config.task} has no evaluation. Fine-tune a task that has one.")

    def build(self) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        """A model on top of `model.decoder`, or one that starts from the weights of `model.init_from`."""
        settings = self.config.model
        model, processor = self._continued(settings.init_from) if settings.init_from else self._fresh()
        model.checkpoint_activations(self.config.training.activation_checkpointing)
        return model, processor

    def _fresh(self) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        settings = self.config.model
        folder = manifest.fetch_folder(settings.decoder)
        text_config = AutoConfig.from_pretrained(folder)
        self.validate_length(settings.num_queries, text_config)
        _validate_decoder(settings.text, text_config)
        vision_encoder = self._vision_encoder()
        tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(folder))
        text_config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
        config = MPlugVideoConfig(
            vision_config=vision_encoder.config,
            text_config=text_config,
            num_queries=settings.num_queries,
            query_norm=settings.query_norm,
            use_contrastive=settings.use_contrastive,
            contrastive_size=settings.contrastive_size,
            temperature=settings.temperature,
            **self.freezing(),
            **self.head_settings(),
        )
        decoder = AutoModelForCausalLM.from_pretrained(folder, config=decoder_config(config), dtype=torch.float32)
        model = self.model_class(config, vision_encoder=vision_encoder, decoder=decoder)
        vision = config.vision_config
        return model, MPlugVideoProcessor(tokenizer, image_size=vision.image_size, num_frames=vision.num_frames)

    def _vision_encoder(self) -> TimeSformer:
        settings = self.config.model
        if not settings.vision_weights:
            return TimeSformer(TimeSformerConfig(**settings.vision.model_dump()))
        encoder = TimeSformer.from_pretrained(manifest.fetch_folder(settings.vision_weights), dtype=torch.float32)
        encoder.resize(settings.vision.image_size, settings.vision.num_frames)
        _validate_vision(settings.vision, encoder.config, settings.vision_weights)
        return encoder

    def _continued(self, uri: str) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        folder, vision = manifest.fetch_folder(uri), self.config.model.vision
        config = MPlugVideoConfig.from_pretrained(folder)
        self.validate_length(config.num_queries, config.text_config)
        config.update({**self.freezing(), **self.head_settings()})
        model, report = self.model_class.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = [name for name in report["missing_keys"] if not name.startswith(FRESH_HEADS)]
        if missing or report["mismatched_keys"]:
            names = ", ".join([*missing, *(str(key[0]) for key in report["mismatched_keys"])][:3])
            raise ConfigError(
                f"{uri} must hold every weight but the task's head; missing or of another shape: {names}."
            )
        model.vision_encoder.resize(vision.image_size, vision.num_frames)
        _validate_vision(vision, model.vision_encoder.config, uri)
        processor = MPlugVideoProcessor.from_pretrained(folder)
        processor.image_size, processor.num_frames = vision.image_size, vision.num_frames
        return model, processor

    def freezing(self) -> dict[str, bool]:
        """Fields of MPlugVideoConfig that say what is trained."""
        names = ("freeze_decoder", "freeze_vision", "decoder_dropout")
        return {name: getattr(self.config.model, name) for name in names}

    def validate_length(self, prefix: int, text_config: PreTrainedConfig) -> None:
        """A prefix and a text must fit into the decoder's positions together."""
        positions, longest = getattr(text_config, "max_position_embeddings", None), self.config.data.max_length
        if positions and prefix + longest > positions:
            raise ConfigError(
                f"model.num_queries + data.max_length must not exceed the decoder's {positions} positions, "
                f"got {prefix} + {longest}."
            )

    def head_settings(self) -> dict[str, Any]:
        """Fields of MPlugVideoConfig that the task's head needs."""
        return {}

    def class_names(self) -> list[str]:
        """The dataset's categories."""
        names: list[str] = read_dataset_info(self.config.data.shards)["class_names"]
        if not names:
            raise ConfigError(
                f"data.shards must be a classification dataset, {self.config.data.shards} has no classes."
            )
        return names

    def pixel_values(self, examples: list[Example]) -> Tensor:
        """The examples' clips, normalised, (B, C, T, H, W)."""
        return self.processor.normalize([example.clip for example in examples if example.clip is not None])

    def encode_texts(self, examples: list[Example], max_words: int) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, L) of the examples' cleaned texts."""
        texts = [clean_caption(example.annotation.text, max_words) for example in examples]
        return self.processor.texts(texts, self.config.data.max_length)


def _validate_decoder(expected: dict[str, Any], found: PreTrainedConfig) -> None:
    """A preset is made for one decoder: its sizes must be those of the folder that was given."""
    for key, value in expected.items():
        if getattr(found, key, None) != value:
            raise ConfigError(
                f"model.text.{key} must be that of model.decoder, {getattr(found, key, None)}, got {value}."
            )


def _validate_vision(expected: VisionConfig, found: TimeSformerConfig, uri: str) -> None:
    for key, value in expected.model_dump(exclude={"initializer_range"}).items():
        if getattr(found, key) != value:
            raise ConfigError(f"model.vision.{key} must be that of {uri}, {getattr(found, key)}, got {value}.")


class TaskNetwork(nn.Module):
    """A task's loss as a module, so that an engine that wraps `forward` (ZeRO, DDP) sees every parameter's use."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.task_loss, self.task_predict = task.loss, task.predict

    def forward(self, batch: Batch, predict: bool = False) -> tuple[Tensor, Logs] | list[Prediction]:
        return self.task_predict(batch) if predict else self.task_loss(batch)
