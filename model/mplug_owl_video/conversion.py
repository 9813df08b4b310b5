"""mPLUG-Owl's training checkpoints -> folders in the published layout, and back: `mplug convert SOURCE DEST`.

A training checkpoint is what the original's trainer writes: a folder of all weights, of all weights with those of LoRA
under the names of peft, or of an adapter alone. Updates of LoRA are merged into the weights they belong to.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.conversion import Conversion, Recipe, write_conversion
from model.errors import ConversionError
from model.mplug_owl_video.configuration import MplugOwlConfig
from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration
from model.weight_files import open_checkpoint

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""One of them must be there."""
COPIED = (
    *(CONFIG, "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *(*TOKENIZERS, "added_tokens.json", "vocab.json", "merges.txt"),
)
"""Files of a published folder other than weights."""
PREFIX = re.compile(r"^(module\.|base_model\.model\.)+")
"""Of the names that DDP and peft give to weights."""
LORA = re.compile(r"^(?P<layer>.+)\.lora_(?P<matrix>[AB])(\.\w+)?\.weight$")
NOT_LORA = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
"""Settings of peft that change the merged weights in other ways."""
LORA_ALPHA = 32
"""Of the original's training scripts, whose checkpoints do not store it."""


def is_mplug_owl(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensors is an mPLUG-Owl, or an adapter for one."""
    return any(LORA.match(name) or PREFIX.sub("", name) == "query_tokens" for name in names)


def convert_mplug_owl(
    source: Path,
    dest: Path,
    *,
    base: Path | None = None,
    lora_alpha: int | None = None,
    format: str = "safetensors",
    drop: Iterable[str] = (),
) -> Conversion:
    """Writes `dest`, which must not exist, and returns a record of every tensor.

    Weights, configuration and tokenizer that `source` does not have come from `base`, a published folder. `lora_alpha`
    is that of peft's configuration by default, or else LORA_ALPHA. The format bin is that of the published model and of
    the original's trainer, with all names of tied weights. Tensors whose names match a pattern of `drop` are skipped.
    Raises ConversionError.
    """
    files = _files(source, base)
    config = MplugOwlConfig.from_pretrained(files[CONFIG].parent)
    conversion = Conversion(config, MplugOwlForConditionalGeneration, files=list(files.values()))
    updates: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in open_checkpoint(source).items():
        own = PREFIX.sub("", name).replace(".base_layer.", ".")
        if reason := _reason_to_drop(name, own, drop):
            conversion.dropped[name] = reason
        elif lora := LORA.match(own):
            updates.setdefault(f"{lora['layer']}.weight", {})[lora["matrix"]] = name, tensor
        else:
            conversion.map(name, own, Recipe([tensor]))
    _drop_tied(conversion)
    for name, tensor in open_checkpoint(base).items() if base else ():
        own = conversion.tied.get(name, name)
        if own not in conversion.recipes and not _reason_to_drop(name, name, drop):
            conversion.recipes[own] = Recipe([tensor])
            conversion.from_base.append(own)
    _merge(conversion, updates, source, lora_alpha)
    write_conversion(conversion, source, dest, format)
    return conversion


def _reason_to_drop(name: str, own: str, drop: Iterable[str]) -> str:
    """Why a tensor is not converted; empty if it is."""
    if any(fnmatch(name, pattern) for pattern in drop):
        return "asked for (--drop)"
    return "computed from the configuration" if own.endswith("rotary_emb.inv_freq") else ""


def _files(source: Path, base: Path | None) -> dict[str, Path]:
    """The files to copy by name, those of the source first."""
    folders = [folder for folder in (source, base) if folder]
    found = {name: folder / name for folder in reversed(folders) for name in COPIED if (folder / name).is_file()}
    tokenizer = next((name for name in TOKENIZERS if name in found), TOKENIZERS[0])
    for name in (CONFIG, "preprocessor_config.json", tokenizer):
        if name not in found and base:
            raise ConversionError(f"{base} must hold {name}, as a published model does.")
        if name not in found:
            raise ConversionError(
                f"{source} has no {name}: name the published model that it was trained from with --base."
            )
    return found


def _merge(
    conversion: Conversion, updates: Mapping[str, Mapping[str, tuple[str, Tensor]]], source: Path, alpha: int | None
) -> None:
    """Adds the updates of LoRA to the rules of their weights."""
    settings: dict[str, Any] = {}
    if (source / ADAPTER_CONFIG).is_file():
        settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if wrong := next((key for key in NOT_LORA if settings.get(key)), None):
            raise ConversionError(f"{source / ADAPTER_CONFIG} must not set {wrong}, which cannot be merged here.")
    scale = alpha or settings.get("lora_alpha", LORA_ALPHA)
    for target, matrices in updates.items():
        if target not in conversion.recipes:
            raise ConversionError(
                f"{target} must be in the checkpoint or in --base for the update of LoRA, but it is not."
            )
        if len(matrices) != 2:
            raise ConversionError(f"{target} must have both matrices of LoRA, but it has only {next(iter(matrices))}.")
        (name_a, a), (name_b, b) = matrices["A"], matrices["B"]
        merge = partial(_merged, a=a, b=b, scale=scale / len(a), transposed=settings.get("fan_in_fan_out", False))
        conversion.recipes[target] = replace(conversion.recipes[target], transform=merge)
        conversion.mapped |= {name_a: target, name_b: target}


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool) -> Tensor:
    """The weight (out, in) with the update b (out, r) · a (r, in), computed in fp32."""
    update = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
    return (weight.float() + (update.T if transposed else update)).to(weight.dtype)


def _drop_tied(conversion: Conversion) -> None:
    """Keeps one name of tied weights. Raises ConversionError if they differ."""
    recipes, sources = conversion.recipes, {own: name for name, own in conversion.mapped.items()}
    for other in conversion.tied.keys() & recipes.keys():
        name = conversion.tied[other]
        if name in recipes and not torch.equal(recipes[name].make(), recipes[other].make()):
            raise ConversionError(f"{other} must equal {name}, because config.json ties them, but it differs.")
        recipe, source = recipes.pop(other), sources[other]
        del conversion.mapped[source]
        if name in recipes:
            conversion.dropped[source] = f"the same as {name}"
        else:
            conversion.map(source, name, recipe)
