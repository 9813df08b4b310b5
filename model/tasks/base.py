"""What every objective provides, and how its networks are built."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from model import manifest
from model.config import ConfigError, RunConfig
from model.data.loader import Batch, Example
from model.data.shards import describe
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.mplug_video.processing import MPlugVideoProcessor, clean_caption
from model.mplug_video.tokenization import encode_sentence

Prediction = dict[str, Any]
"""One evaluated clip, ready for JSON: `video`, and what the task adds."""
Logs = dict[str, Tensor]
"""Scalars of one step, by metric name, kept on the device until they are logged."""

FRESH_HEADS = ("vision_proj.", "text_proj.", "temperature", "classifier.")
"""Parameters that a task may add to the model it starts from. Any other missing weight is an error."""


class Task(ABC):
    """An objective with its network and processor. `network` is what the engine trains."""

    reads_video: ClassVar[bool] = True
    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model, self.processor = self.build()
        self.network = TaskNetwork(self)

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Training batch."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        """The loss to minimise and its parts."""

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        """Evaluation batch; holds the annotations as well."""
        return {**self.collate(examples), "annotations": [example.annotation for example in examples]}

    def predict(self, batch: Batch) -> list[Prediction]:
        """One prediction per clip of an evaluation batch."""
        raise ConfigError(f"task {self.config.task} has no evaluation. Fine-tune a task that has one.")

    def build(self) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        """A model on top of `model.decoder`, or one that starts from the weights of `model.init_from`."""
        settings = self.config.model
        if settings.init_from:
            return self._continued(settings.init_from)
        folder = manifest.fetch(settings.decoder)
        text_config = AutoConfig.from_pretrained(folder)
        self.refuse_too_long(settings.num_queries, text_config)
        config = MPlugVideoConfig(
            vision_config=TimeSformerConfig(**settings.vision.model_dump()),
            text_config=text_config,
            num_queries=settings.num_queries,
            use_contrastive=settings.use_contrastive,
            contrastive_size=settings.contrastive_size,
            temperature=settings.temperature,
            freeze_decoder=settings.freeze_decoder,
            **self.head_settings(),
        )
        model = self.model_class(config)
        model.decoder.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
        vision = config.vision_config
        processor = MPlugVideoProcessor(
            AutoTokenizer.from_pretrained(folder), image_size=vision.image_size, num_frames=vision.num_frames
        )
        return model, processor

    def _continued(self, uri: str) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        folder = manifest.fetch(uri)
        config = MPlugVideoConfig.from_pretrained(folder)
        self.refuse_too_long(config.num_queries, config.text_config)
        config.update({"freeze_decoder": self.config.model.freeze_decoder, **self.head_settings()})
        model, report = self.model_class.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = [name for name in report["missing_keys"] if not name.startswith(FRESH_HEADS)]
        if missing or report["mismatched_keys"]:
            names = ", ".join([*missing, *(str(key[0]) for key in report["mismatched_keys"])][:3])
            raise ConfigError(
                f"{uri} must hold every weight but the task's head; missing or of another shape: {names}."
            )
        return model, MPlugVideoProcessor.from_pretrained(folder)

    def refuse_too_long(self, prefix: int, text_config: PreTrainedConfig) -> None:
        """A prefix and a text must fit into the decoder's positions together."""
        positions = getattr(text_config, "max_position_embeddings", None)
        longest = self.config.data.max_length
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
        names: list[str] = describe(self.config.data.shards)["class_names"]
        if not names:
            raise ConfigError(
                f"data.shards must be a classification dataset, {self.config.data.shards} has no classes."
            )
        return names

    def encode_texts(self, examples: list[Example], max_words: int) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, L) of the examples' cleaned texts."""
        tokenizer, length = self.processor.tokenizer, self.config.data.max_length
        texts = (clean_caption(example.annotation.text, max_words) for example in examples)
        return self.pad([encode_sentence(tokenizer, text, length) for text in texts])

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, L), padded on the right to the longest row."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.processor.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        return ids, mask


class TaskNetwork(nn.Module):
    """A task's loss as a module, so that an engine that wraps `forward` (ZeRO, DDP) sees every parameter's use."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.task_loss = task.loss

    def forward(self, batch: Batch) -> tuple[Tensor, Logs]:
        return self.task_loss(batch)


def stack_clips(examples: list[Example]) -> Tensor:
    """(B, C, T, H, W)"""
    return torch.stack([example.clip for example in examples if example.clip is not None])


def answer_mask(attention_mask: Tensor, prompt_lengths: list[int]) -> Tensor:
    """Loss mask (B, L - 1) of the tokens after the prompt: column j is the loss of token j + 1."""
    mask = attention_mask[:, 1:].clone()
    for row, length in enumerate(prompt_lengths):
        mask[row, :length] = 0
    return mask
