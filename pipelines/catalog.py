"""The pipelines by name, and their arguments."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import dropwhile
from pathlib import Path
from typing import Any

import yaml

from model.config.load import YamlLoader
from model.errors import ConfigError

PIPELINES = {
    "mplug-video": "pipelines.demo.demo_pipeline",
    "pretrain": "pipelines.pretrain.pretrain",
    "finetune": "pipelines.finetune.finetune",
    "benchmark": "pipelines.benchmark.benchmark",
}
COMPILED = Path(__file__).parent / "compiled"


def load_pipeline(name: str) -> Any:
    """The kfp pipeline of this name."""
    module, _, attribute = PIPELINES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def compile_to(name: str, folder: Path) -> Path:
    from kfp import compiler

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{name}.yaml"
    compiler.Compiler().compile(load_pipeline(name), str(out))
    # remove kfp's comment, which repeats the defaults in an order that differs between processes
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(dropwhile(lambda line: line.startswith("#"), lines)), encoding="utf-8")
    return out


def compiled_documents(name: str) -> list[dict[str, Any]]:
    """The compiled pipeline: its specification and its Kubernetes settings. Raises ConfigError for an unknown name."""
    if name not in PIPELINES:
        raise ConfigError(f"no pipeline named {name}. Known: {', '.join(PIPELINES)}.")
    return list(yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text(encoding="utf-8")))


@cache
def pipeline_parameters(name: str) -> dict[str, Any]:
    """Type, default and description of each parameter of a pipeline."""
    return compiled_documents(name)[0]["root"]["inputDefinitions"]["parameters"]


def parse_arguments(name: str, items: Sequence[str]) -> dict[str, Any]:
    """Parses `parameter=value` with YAML values. Raises ConfigError with all problems."""
    known = pipeline_parameters(name)
    found: dict[str, Any] = {}
    problems: list[str] = []
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"The nearest is {near[0]}." if near else f"Known: {', '.join(known)}."
            problems.append(f"{item} must be parameter=value of pipeline {name}. {hint}")
            continue
        kind = known[key]["parameterType"]
        parse, expected = KINDS[kind]
        try:
            value = parse(text)
        except (ValueError, yaml.YAMLError):
            value = None
        if not isinstance(value, expected):
            problems.append(f"{key} must be of type {kind}, got {text!r}. {known[key].get('description', '')}")
        found[key] = value
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def with_defaults(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a run. Raises ConfigError if a parameter without a default is missing."""
    known = pipeline_parameters(name)
    missing = [key for key, parameter in known.items() if not parameter.get("isOptional") and key not in given]
    if missing:
        raise ConfigError("\n".join(f"{key} must be given: {known[key].get('description', '')}" for key in missing))
    return {**{key: parameter.get("defaultValue") for key, parameter in known.items()}, **given}


def _yaml(text: str) -> Any:
    return yaml.load(text, YamlLoader)


KINDS: dict[str, tuple[Callable[[str], Any], type]] = {
    "STRING": (str, str),
    "NUMBER_INTEGER": (int, int),
    "NUMBER_DOUBLE": (float, float),
    "BOOLEAN": (_yaml, bool),
    "LIST": (_yaml, list),
    "STRUCT": (_yaml, dict),
}
"""Parser and Python type of kfp's parameter types."""
