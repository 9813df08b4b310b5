"""Builds the network of a task: from weights, or on the meta device for planning."""

import json
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from model import manifest
from model.config.schema import RunConfig
from model.errors import ConfigError
from model.mplug_owl_video.configuration import MplugOwlConfig
from model.mplug_video import modeling
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.mplug_video.processing import MPlugVideoProcessor
from model.mplug_video.tokenization import with_special_tokens
from model.mplug_video.vision import TimeSformer
from model.tasks import build_mplug_owl, task_class
from model.tasks.base import Task
from model.tasks.decoders import decoder_shape, fresh_decoder_config, validate_sizes

NOT_SIZES = {"initializer_range"}
"""Settings of the vision encoder that existing weights need not match."""
MPLUG_OWL = "MplugOwlForConditionalGeneration"
"""Built by build_mplug_owl.py; the other classes are those of mPLUG-Video."""
Built = tuple[PreTrainedModel, Any]


def build_task(config: RunConfig, *, is_trained: bool = False) -> Task:
    """The task of a configuration, built on `model.decoder` or from the weights of `model.init_from`.

    If the model `is_trained` for the task, no weight may be missing.
    """
    task = task_class(config.task)
    try:
        if is_trained:
            _validate_head(config, task)
        if task.architecture == MPLUG_OWL:
            model, processor = build_mplug_owl.build_model(config)
        elif not task.architecture:
            model, processor = _fresh_decoder(config)
        else:
            build = partial(_continued, is_trained=is_trained) if config.model.init_from else _fresh
            model, processor = build(config, task)
            model.checkpoint_activations(config.training.activation_checkpointing)
    except ValueError as error:  # transformers rejects a shape of the configuration
        raise ConfigError(f"model cannot be built: {' '.join(str(error).split())}") from error
    return task(config, model, processor)


def build_trained(config: RunConfig) -> Task:
    """The task to evaluate, with all weights of `model.init_from`: in bf16 on a GPU if it was trained so, else in fp32.

    Raises ConfigError if the model lacks the task's head, which `build_task` would make anew.
    """
    is_half = torch.cuda.is_available() and config.training.precision == "bf16"
    training = config.training.model_copy(update={"precision": "bf16" if is_half else "fp32"})
    task = build_task(config.model_copy(update={"training": training}), is_trained=True)
    task.model.to(torch.bfloat16 if is_half else torch.float32)
    return task


def build_meta_task(
    config: RunConfig, device: str = "meta", layers: tuple[int, int] | None = None, vocabulary: int = 0
) -> Task:
    """A task with arbitrary weights, without tokenizer and data. On "meta" it takes no memory.

    `layers` overrides the depths of vision encoder and decoder, `vocabulary` the vocabulary size.
    """
    task, vision, text = task_class(config.task), config.model.vision, decoder_shape(config)
    text.update({"dtype": torch.float32})
    if vocabulary:
        text.update({"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    vision_config = TimeSformerConfig(**vision.model_dump())
    if layers:
        vision_config.update({"num_hidden_layers": layers[0]})
        text.update({"num_hidden_layers": layers[1]})
    with torch.device(device):
        if task.architecture == MPLUG_OWL:
            return task(config, *build_mplug_owl.build_meta_model(config, text, layers))
        if not task.architecture:
            model = AutoModelForCausalLM.from_config(text)
        else:
            names = [str(number) for number in range(task.planned_classes)]
            model = getattr(modeling, task.architecture)(_model_config(config, vision_config, text, names or None))
            model.checkpoint_activations(config.training.activation_checkpointing)
    return task(config, model, MPlugVideoProcessor(None, image_size=vision.image_size, num_frames=vision.num_frames))


def _fresh(config: RunConfig, task: type[Task]) -> Built:
    settings = config.model
    folder = manifest.fetch_folder(settings.decoder)
    text_config = AutoConfig.from_pretrained(folder)
    _validate_length(config, settings.num_queries, text_config)
    validate_sizes("text", settings.text, text_config, "model.decoder")
    vision_encoder = _vision_encoder(config)
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(folder))
    text_config.update({"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    model_config = _model_config(config, vision_encoder.config, text_config, task.class_names(config))
    decoder = AutoModelForCausalLM.from_pretrained(
        folder, config=modeling.decoder_config(model_config), dtype=torch.float32
    )
    model = getattr(modeling, task.architecture)(model_config, vision_encoder=vision_encoder, decoder=decoder)
    vision = model_config.vision_config
    return model, MPlugVideoProcessor(tokenizer, image_size=vision.image_size, num_frames=vision.num_frames)


def _model_config(
    config: RunConfig, vision: TimeSformerConfig, text: PreTrainedConfig, class_names: list[str] | None
) -> MPlugVideoConfig:
    fields = {"num_queries", "query_norm", "use_contrastive", "contrastive_size", "temperature"}
    settings = {**config.model.model_dump(include=fields), **_freezing(config)}
    return MPlugVideoConfig(vision_config=vision, text_config=text, class_names=class_names, **settings)


def _freezing(config: RunConfig) -> dict[str, bool]:
    """Fields of MPlugVideoConfig that select the trained parts."""
    return config.model.model_dump(include={"freeze_decoder", "freeze_vision", "decoder_dropout"})


def _vision_encoder(config: RunConfig) -> TimeSformer:
    settings = config.model
    if not settings.vision_weights:
        return TimeSformer(TimeSformerConfig(**settings.vision.model_dump()))
    encoder = TimeSformer.from_pretrained(manifest.fetch_folder(settings.vision_weights), dtype=torch.float32)
    encoder.resize(settings.vision.image_size, settings.vision.num_frames)
    validate_sizes("vision", settings.vision.model_dump(exclude=NOT_SIZES), encoder.config, settings.vision_weights)
    return encoder


def _validate_head(config: RunConfig, task: type[Task]) -> None:
    """The model must be of the task's family, and its classes those of the dataset."""
    uri, names = config.model.init_from, task.class_names(config)
    described = json.loads((manifest.fetch_model(uri) / "config.json").read_text(encoding="utf-8"))
    family = MplugOwlConfig.model_type if task.architecture == MPLUG_OWL else MPlugVideoConfig.model_type
    if (kind := described.get("model_type")) != family:
        raise ConfigError(
            f"task {config.task} needs a model of type {family}, but {uri} is of type {kind}. --zero-shot asks any."
        )
    own = described.get("class_names") or []
    if own and names and set(own) != set(names):
        others = ", ".join(sorted(set(names) ^ set(own))[:5])
        raise ConfigError(f"the classes of {uri} must be those of {config.data.shards}; only one of them has {others}.")


def _continued(config: RunConfig, task: type[Task], *, is_trained: bool) -> Built:
    uri, vision = config.model.init_from, config.model.vision
    folder = manifest.fetch_model(uri)
    model_config = MPlugVideoConfig.from_pretrained(folder)
    _validate_length(config, model_config.num_queries, model_config.text_config)
    names = task.class_names(config)
    if not (is_trained and model_config.class_names):  # a trained head defines the order
        model_config.update({"class_names": names} if names else {})
    model_config.update(_freezing(config))
    model, report = getattr(modeling, task.architecture).from_pretrained(
        folder, config=model_config, dtype=torch.float32, output_loading_info=True
    )
    head = [name for name in report["missing_keys"] if name.startswith(modeling.HEADS)]
    if head and is_trained:
        raise ConfigError(
            f"{uri} has no head for task {config.task}: {sorted(head)[0]} is missing. Fine-tune it, or use --zero-shot."
        )
    missing = sorted(set(report["missing_keys"]) - set(head))
    if missing or report["mismatched_keys"]:
        found = ", ".join([*missing, *(str(key[0]) for key in report["mismatched_keys"])][:3])
        raise ConfigError(f"{uri} must hold every weight but the task's head; missing or of another shape: {found}.")
    model.vision_encoder.resize(vision.image_size, vision.num_frames)
    validate_sizes("vision", vision.model_dump(exclude=NOT_SIZES), model.vision_encoder.config, uri)
    processor = MPlugVideoProcessor.from_pretrained(folder)
    processor.image_size, processor.num_frames = vision.image_size, vision.num_frames
    return model, processor


def _fresh_decoder(config: RunConfig) -> Built:
    """A decoder built from `model.text`, with the tokenizer of `model.decoder`."""
    tokenizer = AutoTokenizer.from_pretrained(manifest.fetch_folder(config.model.decoder))
    text_config = fresh_decoder_config(config, tokenizer)
    _validate_length(config, config.model.num_queries, text_config)
    return AutoModelForCausalLM.from_config(text_config), MPlugVideoProcessor(tokenizer, image_size=0, num_frames=0)


def _validate_length(config: RunConfig, prefix: int, text_config: PreTrainedConfig) -> None:
    """Prefix and text together must fit into the positions of the decoder."""
    positions, longest = getattr(text_config, "max_position_embeddings", None), config.data.max_length
    if positions and prefix + longest > positions:
        raise ConfigError(
            f"model.num_queries + data.max_length must not exceed the decoder's {positions} positions, "
            f"got {prefix} + {longest}."
        )
