"""Builds mPLUG-Owl for the task instruction: from a published or tuned model, or fresh visual parts on any decoder."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from model import manifest
from model.causal_lm import without_dropout
from model.config.schema import RunConfig
from model.errors import ConfigError
from model.mplug_owl_video.configuration import MplugOwlConfig
from model.mplug_owl_video.lora import add_lora
from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration
from model.mplug_owl_video.processing import SYSTEM, MplugOwlImageProcessor, MplugOwlProcessor
from model.mplug_video.tokenization import with_special_tokens
from model.tasks.decoders import fresh_decoder_config, special_tokens, validate_sizes

SIZES = {"image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
"""Fields of `model.vision` that existing weights must match."""
Built = tuple[MplugOwlForConditionalGeneration, MplugOwlProcessor]


def build_model(config: RunConfig) -> Built:
    """The model with the trained parts of the configuration, and its processor."""
    model, processor = (_continued if config.model.init_from else _fresh)(config)
    processor.num_frames = config.model.vision.num_frames
    processor.system = config.model.system or processor.system
    prepare(model, config)
    return model, processor


def build_meta_model(config: RunConfig, text_config: PreTrainedConfig, layers: tuple[int, int] | None) -> Built:
    """A model with arbitrary weights, on the default device, and a processor without a tokenizer."""
    model_config = _model_config(config, text_config)
    if layers:
        model_config.vision_config.update({"num_hidden_layers": layers[0]})
    model = MplugOwlForConditionalGeneration(model_config)
    prepare(model, config)
    return model, _processor(config, None)


def prepare(model: MplugOwlForConditionalGeneration, config: RunConfig) -> None:
    """Freezes parts, adds LoRA, and sets which activations are recomputed."""
    settings = config.model
    model.vision_model.requires_grad_(not settings.freeze_vision)
    for part in (model.abstractor, model.query_tokens, model.temporal_query_tokens):
        part.requires_grad_(not settings.freeze_abstractor)
    model.language_model.requires_grad_(not settings.freeze_decoder)
    if lora := settings.lora.rank:
        add_lora(model.language_model, rank=lora, alpha=settings.lora.alpha, dropout=settings.lora.dropout)
    model.checkpoint_activations(config.training.activation_checkpointing)


def _continued(config: RunConfig) -> Built:
    uri, vision = config.model.init_from, config.model.vision
    folder = manifest.fetch_model(uri)
    model_config = MplugOwlConfig.from_pretrained(folder)
    validate_sizes("vision", vision.model_dump(include=SIZES), model_config.vision_config, uri)
    _prepare_decoder(config, model_config.text_config)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    model = MplugOwlForConditionalGeneration.from_pretrained(folder, config=model_config, dtype=dtype)
    return model, MplugOwlProcessor.from_pretrained(folder)


def _fresh(config: RunConfig) -> Built:
    folder = manifest.fetch_folder(config.model.decoder)
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(folder))
    if is_trained := (folder / "config.json").exists():
        text_config = AutoConfig.from_pretrained(folder)
        validate_sizes("text", config.model.text, text_config, "model.decoder")
        text_config.update(special_tokens(tokenizer))
    elif config.model.freeze_decoder:
        raise ConfigError(f"model.decoder must hold a decoder if it is frozen, but {folder} has only a tokenizer.")
    else:
        text_config = fresh_decoder_config(config, tokenizer)
    _prepare_decoder(config, text_config)
    if is_trained:
        decoder = AutoModelForCausalLM.from_pretrained(folder, config=text_config, dtype=torch.float32)
    else:
        decoder = AutoModelForCausalLM.from_config(text_config)
    model = MplugOwlForConditionalGeneration(_model_config(config, text_config), language_model=decoder)
    return model, _processor(config, tokenizer)


def _model_config(config: RunConfig, text_config: PreTrainedConfig) -> MplugOwlConfig:
    settings, vision = config.model, config.model.vision
    given = vision.model_dump(include=SIZES | {"layer_norm_eps", "initializer_range"})
    return MplugOwlConfig(
        vision_config={**given, "intermediate_size": vision.mlp_ratio * vision.hidden_size},
        visual_abstractor_config={
            **settings.abstractor.model_dump(),
            "hidden_size": vision.hidden_size,
            "encoder_hidden_size": vision.hidden_size,
            "initializer_range": vision.initializer_range,
        },
        text_config=text_config,
        num_query_tokens=settings.num_queries,
    )


def _processor(config: RunConfig, tokenizer: Any) -> MplugOwlProcessor:
    vision = config.model.vision
    size = {"height": vision.image_size, "width": vision.image_size}
    image_processor = MplugOwlImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=size)
    length = config.model.num_queries + 1
    return MplugOwlProcessor(image_processor, tokenizer, length, vision.num_frames, config.model.system or SYSTEM)


def _prepare_decoder(config: RunConfig, text_config: PreTrainedConfig) -> None:
    """Removes the dropout of a frozen decoder, unless the configuration asks for it. Raises ConfigError if rows are
    longer than the decoder can read."""
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length must not exceed the decoder's {positions} positions, got {config.data.max_length}."
        )
    if config.model.freeze_decoder and not config.model.decoder_dropout:
        without_dropout(text_config)
