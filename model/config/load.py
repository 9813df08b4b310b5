"""Reads a run's configuration: a YAML preset and `dotted.key=value` overrides become one frozen RunConfig.

    config = load_config("tiny_pretraining", ["optim.lr=3e-4", "training.steps=100"])

Every problem of a file is reported at once: unknown keys with the nearest known one, wrong types, impossible
combinations.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.config.problems import explain, prune
from model.config.schema import TASK_DATASETS, RunConfig
from model.errors import ConfigError

PRESETS = Path(__file__).parents[1] / "configs"


def load_config(source: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a preset by name or a YAML file, applies `dotted.key=value` overrides, and checks everything.

    Raises ConfigError with one line per problem.
    """
    return override_config(read_config(source), overrides or [])


def override_config(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Applies `dotted.key=value` overrides to a configuration, and checks everything."""
    problems: list[str] = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            problems.append(f"override must be dotted.key=value, got {override!r}.")
            continue
        try:
            # YAML reads nothing as null; on a command line `key=` means the empty string
            parsed = yaml.load(value, YamlLoader) if value else ""
        except yaml.YAMLError:
            problems.append(f"{key} must be a valid YAML value, got {value!r}.")
            continue
        _assign(tree, key.strip().split("."), parsed, problems)
    return parse_config(tree, problems)


def preset_dataset(name: str) -> str:
    """The dataset that a preset's task reads. The name of a dataset is returned unchanged."""
    if name in TASK_DATASETS.values():
        return name
    return TASK_DATASETS[load_config(name, ["data.shards=set-later", "model.decoder=set-later"]).task]


def list_presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class YamlLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does. PyYAML reads 1e-4, without a dot, as a string."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(source: str | Path) -> dict[str, Any]:
    """The settings of a preset or a YAML file, before they are checked."""
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        path = PRESETS / f"{source}.yaml"
        if not path.exists():
            near = difflib.get_close_matches(str(source), list_presets(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"no preset named {source}: {hint}Known: {', '.join(list_presets())}; or give a .yaml file."
            )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(tree).__name__}.")
    return tree


def _assign(tree: dict[str, Any], keys: list[str], value: Any, problems: list[str]) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            problems.append(f"{'.'.join(keys)} cannot be set: {key} is a value, not a section.")
            return
    tree[keys[-1]] = value


def parse_config(tree: dict[str, Any], problems: Sequence[str] = ()) -> RunConfig:
    """Validates a configuration, such as one saved with a model. `problems` were found before.

    It is validated repeatedly, without the wrong values found so far, so that all problems are reported at once.
    """
    tree, problems = _text_keys(tree), [*problems]
    while True:
        try:
            # as JSON in strict mode: lists become tuples, but "1" does not become 1
            config = RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
            break
        except ValidationError as error:
            problems += [line for item in error.errors() for line in explain(item, RunConfig)]
            if not prune(tree, error.errors()):
                raise ConfigError("\n".join(dict.fromkeys(problems))) from None
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def _text_keys(value: Any) -> Any:
    """Converts keys to text: YAML reads `on:` as a boolean and `1:` as a number, JSON has only text keys."""
    return {str(key): _text_keys(item) for key, item in value.items()} if isinstance(value, dict) else value
