"""A run's networks without its weights: to count what they will take before anything is downloaded or launched."""

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from model import storage
from model.config.schema import RunConfig
from model.data.loading.loader import Batch
from model.errors import ConfigError, NotFoundError
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.tasks import TASKS, Task

CLASSES = {"classification": 45, "matching": 2}
"""Sizes of the heads: the paper's categories, and whether a title belongs to a clip."""
ROWS_PER_CLIP = {"matching": 3}
"""Texts that are read after one clip: the right title and two others."""


def build_meta_model(
    config: RunConfig, device: str = "meta", layers: tuple[int, int] | None = None, vocabulary: int = 0
) -> PreTrainedModel:
    """The task's model with weights of no meaning; on "meta" without any memory.

    `layers` replaces the depths of the vision encoder and of the decoder, `vocabulary` the number of words.
    """
    text = text_config(config)
    text.update({"dtype": torch.float32})
    if vocabulary:
        text.update({"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    vision = TimeSformerConfig(**config.model.vision.model_dump())
    if layers:
        vision.update({"num_hidden_layers": layers[0]})
        text.update({"num_hidden_layers": layers[1]})
    with torch.device(device):
        if config.task == "language_modeling":
            return AutoModelForCausalLM.from_config(text)
        settings = config.model
        whole = MPlugVideoConfig(
            vision_config=vision,
            text_config=text,
            class_names=[str(number) for number in range(CLASSES.get(config.task, 0))] or None,
            **settings.model_dump(include={
                "num_queries", "query_norm", "use_contrastive", "contrastive_size", "temperature", "freeze_decoder",
                "freeze_vision", "decoder_dropout",
            }),
        )  # fmt: skip
        model = TASKS[config.task].model_class(whole)
    model.checkpoint_activations(config.training.activation_checkpointing)
    return model


def text_config(config: RunConfig) -> PreTrainedConfig:
    """The decoder's shape: that of the folder that is named, or of `model.text`."""
    settings = config.model
    for uri, key in ((settings.init_from, "text_config"), (settings.decoder, "")):
        try:
            tree: dict[str, Any] = json.loads(storage.read(storage.join(uri, "config.json"))) if uri else {}
        except NotFoundError:
            tree = {}
        if tree := (tree.get(key, {}) if key else tree):
            return AutoConfig.for_model(tree.pop("model_type"), **tree)
    text = dict(settings.text)
    if not text:
        raise ConfigError(
            "the decoder's shape must be known: give model.decoder a folder, or describe it in model.text."
        )
    return AutoConfig.for_model(text.pop("model_type"), **text)


def task_of(config: RunConfig, model: PreTrainedModel) -> Task:
    """A task that makes losses with `model`, without tokenizer and data."""
    task = object.__new__(TASKS[config.task])
    task.config, task.model, task.categories = config, model, []
    return task


def example_batch(config: RunConfig, clips: int) -> Batch:
    """A batch of the largest shapes that a task's loss may see."""
    vision, length = config.model.vision, config.data.max_length
    rows = clips * ROWS_PER_CLIP.get(config.task, 1)
    if config.task == "language_modeling":
        length += config.model.num_queries
    ids, mask = torch.ones(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
    every = {
        # a view of one number: counting the passes of a large batch must not need its memory
        "pixel_values": torch.zeros(1).expand(clips, 3, vision.num_frames, vision.image_size, vision.image_size),
        "input_ids": ids, "attention_mask": mask, "loss_mask": mask[:, 1:], "title_ids": ids, "title_mask": mask,
        "labels": torch.zeros(rows, dtype=torch.long), "match_ids": torch.arange(rows),
        "clips": torch.arange(rows) % clips,
    }  # fmt: skip
    kept = {"pixel_values", "input_ids", "loss_mask"} if config.task == "captioning" else every.keys()
    return {name: every[name] for name in kept}
