"""Configurations of decoders: of weights that exist, or that are trained from scratch."""

import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from model import storage
from model.config.schema import RunConfig
from model.errors import ConfigError, NotFoundError


def decoder_shape(config: RunConfig) -> PreTrainedConfig:
    """The configuration of the decoder: from its folder, or from `model.text` if the folder does not exist yet."""
    settings = config.model
    for uri, key in ((settings.init_from, "text_config"), (settings.decoder, "")):
        try:
            tree: dict[str, Any] = json.loads(storage.read(storage.join(uri, "config.json"))) if uri else {}
        except NotFoundError:
            tree = {}
        if tree := (tree.get(key, {}) if key else tree):
            return AutoConfig.for_model(**tree)
    if not settings.text:
        raise ConfigError(
            "the shape of the decoder is unknown: set model.decoder to a folder, or describe it in model.text."
        )
    return AutoConfig.for_model(**settings.text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The IDs of a tokenizer's begin, end and padding tokens, as fields of a decoder's configuration."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def fresh_decoder_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a decoder that is built from `model.text`, for a tokenizer."""
    text = config.model.text
    if not text:
        raise ConfigError("model.text must describe the decoder to train (model_type, sizes), but it is empty.")
    text_config = AutoConfig.for_model(vocab_size=len(tokenizer), **special_tokens(tokenizer), **text)
    known = text_config.to_dict().keys() | text_config.attribute_map.keys()
    if unknown := sorted(text.keys() - known):
        raise ConfigError(f"model.text has keys that {text_config.model_type} does not know: {', '.join(unknown)}.")
    return text_config


def validate_sizes(section: str, expected: dict[str, Any], found: PreTrainedConfig, source: str) -> None:
    """A preset is made for weights of one size, which must be that of the given folder."""
    for key, value in expected.items():
        if (size := getattr(found, key, None)) != value:
            raise ConfigError(f"model.{section}.{key} must be that of {source}, {size}, got {value}.")
