"""What conversions of both families have in common: a rule for every tensor, and a folder for `from_pretrained`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from model import manifest
from model.errors import ConversionError
from model.weight_files import write_checkpoint

REPORT = "conversion.json"


@dataclass(frozen=True)
class Recipe:
    """Rule for one of our tensors: made from a published tensor, or from its tensor-parallel parts."""

    parts: Sequence[Tensor]
    dimension: int = 0
    """Dimension in which the parts are concatenated."""
    transform: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def make(self, device: str = "cpu") -> Tensor:
        """The tensor; on "meta" only its shape and type."""
        parts = [part.to(device) for part in self.parts]
        return self.transform(parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dimension))


@dataclass
class Conversion:
    """The result of converting a source. Tensors are made one at a time, when they are written."""

    config: PreTrainedConfig
    architecture: type[PreTrainedModel]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    """Tensors that the source does not have, with fresh values."""
    from_base: list[str] = field(default_factory=list)
    """Tensors that the source does not have, from the model that its training started from."""
    processor: Any = None
    """Processor or tokenizer, if the source's files are not used."""
    files: list[Path] = field(default_factory=list)
    """Files that are copied as they are."""

    @cached_property
    def network(self) -> PreTrainedModel:
        """The network without memory, for names and shapes. The configuration must be complete."""
        with torch.device("meta"):
            return self.architecture(self.config)

    @cached_property
    def tied(self) -> dict[str, str]:
        """Other names of tied weights, which only the format bin repeats, and their own names."""
        own = {id(weights): name for name, weights in self.network.named_parameters()}
        every = self.network.named_parameters(remove_duplicate=False)
        return {name: own[id(weights)] for name, weights in every if own[id(weights)] != name}

    def map(self, source: str, target: str | None, recipe: Recipe) -> None:
        """Without a target the tensor keeps its name, and is reported with all other unknown ones."""
        self.mapped[source] = target or source
        self.recipes[target or source] = recipe

    def summary(self) -> str:
        reasons = {reason: sum(value == reason for value in self.dropped.values()) for reason in self.dropped.values()}
        lines = [f"{self.architecture.__name__}: {len(self.mapped)} tensors mapped"]
        vision = getattr(self.config, "vision_config", self.config)
        if hasattr(vision, "num_frames"):  # settings that cannot be derived from tensors
            lines.append(
                f"vision encoder of {vision.num_hidden_layers} layers, {vision.num_attention_heads} heads, "
                f"for {vision.num_frames} frames of {vision.image_size} pixels"
            )
        lines += [f"{count} dropped: {reason}" for reason, count in reasons.items()]
        if self.initialised:
            lines.append(f"{len(self.initialised)} missing in the source and initialised: {self.initialised[0]}, …")
        if self.from_base:
            lines.append(f"{len(self.from_base)} missing in the source and taken from the base: {self.from_base[0]}, …")
        return "\n".join(lines)


def write_conversion(conversion: Conversion, source: Path, dest: Path, format: str = "safetensors") -> None:
    """Checks all names and shapes against the network, writes to a temporary folder and moves it to `dest`.

    `format` is that of the weight files, safetensors or bin. Raises ConversionError.
    """
    if dest.exists():
        raise ConversionError(f"{dest} must not exist, a conversion writes all of it. Remove it or choose another.")
    forms = _forms(conversion)
    unfinished = dest.with_name(f".{dest.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    conversion.config.architectures = [conversion.architecture.__name__]
    conversion.config.dtype = next(iter(forms.values())).dtype
    conversion.config.save_pretrained(unfinished)
    if conversion.processor is not None:
        conversion.processor.save_pretrained(unfinished)
    for file in conversion.files:
        shutil.copyfile(file, unfinished / file.name)
    build = {name: recipe.make for name, recipe in conversion.recipes.items()}
    if format == "bin":
        forms |= {other: forms[name] for other, name in conversion.tied.items()}
        build |= {other: build[name] for other, name in conversion.tied.items()}
    write_checkpoint(unfinished, forms, build, f"converting {source.name}", format)
    facts: dict[str, Any] = {"source": source.name, "mapped": conversion.mapped, "dropped": conversion.dropped}
    facts |= {"initialised": conversion.initialised, "from_base": conversion.from_base}
    (unfinished / REPORT).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (unfinished / manifest.FILE).write_bytes(manifest.describe_folder(unfinished, source=source.name))
    unfinished.rename(dest)


def _forms(conversion: Conversion) -> dict[str, Tensor]:
    """A meta tensor per target. Raises ConversionError, one line per unknown, missing or misshapen tensor."""
    expected = {name: parameter.shape for name, parameter in conversion.network.named_parameters()}
    sources = {target: name for name, target in conversion.mapped.items()}
    forms = {name: recipe.make("meta") for name, recipe in conversion.recipes.items()}
    problems = [f"{name} is missing in the source." for name in expected if name not in forms]
    for name, form in forms.items():
        source = sources.get(name, name)
        if name not in expected:
            problems.append(f"{source} is not known. Leave it out with --drop {source}.")
        elif form.shape != expected[name]:
            problems.append(f"{source} must be {tuple(expected[name])} as {name}, but it is {tuple(form.shape)}.")
    if problems:
        raise ConversionError("\n".join(problems))
    return forms
