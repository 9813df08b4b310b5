"""Loads a model of either family for inference, with its processor."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from model import manifest
from model.errors import ConfigError
from model.mplug_owl_video import MplugOwlConfig, MplugOwlForConditionalGeneration, MplugOwlProcessor
from model.mplug_video import MPlugVideoConfig, MPlugVideoForConditionalGeneration, MPlugVideoProcessor

FAMILIES = {
    MplugOwlConfig.model_type: "an mPLUG-Owl model, which can talk",
    MPlugVideoConfig.model_type: "an mPLUG-Video model",
}
"""Model types in config.json, and what they stand for."""
Loaded = tuple[PreTrainedModel, Any]


def load_pretrained(uri: str, families: Iterable[str] = FAMILIES) -> Loaded:
    """The model that writes texts, and its processor, from a folder or URI: published, converted or trained here.

    On a GPU in bf16, else in the precision of its weights. The heads of an mPLUG-Video are left out. Raises ConfigError
    if it is not of these families, or not all of its weights are there.
    """
    folder = manifest.fetch_model(uri)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in families:
        wanted = " or ".join(FAMILIES[family] for family in families)
        raise ConfigError(f"{uri} must be {wanted}, but its type is {kind}.")
    on_gpu = torch.cuda.is_available()
    options = {"dtype": torch.bfloat16 if on_gpu else "auto", "device_map": "cuda" if on_gpu else "cpu"}
    if kind == MplugOwlConfig.model_type:
        try:
            model = MplugOwlForConditionalGeneration.from_pretrained(folder, **options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return model.eval(), MplugOwlProcessor.from_pretrained(folder)
    model, report = MPlugVideoForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{uri} must hold every weight of its config.json, {missing[0]} is missing.")
    return model.eval(), MPlugVideoProcessor.from_pretrained(folder)
