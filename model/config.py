"""A run's configuration: a YAML preset and `dotted.key=value` overrides become one frozen RunConfig.

    config = load("tiny_pretraining", ["optim.lr=3e-4", "training.steps=100"])

Every problem of a file is reported at once: unknown keys with the nearest known one, wrong types, impossible
combinations.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from model.config_problems import explain, prune
from model.config_sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    Section,
    TrackingConfig,
    TrainingConfig,
    WatchdogConfig,
)

PRESETS = Path(__file__).parent / "configs"
TaskName = Literal["language_modeling", "pretraining", "classification", "retrieval", "matching", "captioning"]
DATASETS: dict[TaskName, str] = {
    "language_modeling": "pretrain", "pretraining": "pretrain", "classification": "classification",
    "retrieval": "retrieval", "matching": "retrieval", "captioning": "captioning",
}  # fmt: skip


class ConfigError(ValueError):
    """The configuration cannot be used; one line per problem. Ends a command with exit code 2."""


class ConversionError(ValueError):
    """Published weights cannot be converted as they are. Ends a command with exit code 3."""


class TrackingError(OSError):
    """MLflow cannot be used. Transient for a training job, like storage that does not answer."""


class RunConfig(Section):
    """One training run, resolved. Saved beside every model that comes out of it."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Names the run in MLflow and in the output's path."""
    task: TaskName = "pretraining"
    seed: int = 42
    trial: int = Field(1, ge=1)
    """A run that is started again goes on from its checkpoints; with another number it starts from nothing."""
    code_version: str = ""
    """Names the code, where a pipeline runs it: with another one, too, a run starts from nothing."""
    output: str = "output"
    """Folder or URI under which models/<name>/ and checkpoints/<name>-…/ are written."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _refuse_impossible(self) -> "RunConfig":
        if problems := list(_impossible(self)):
            raise ValueError("\n".join(problems))
        return self


def _impossible(config: RunConfig) -> Iterator[str]:
    """Combinations that cannot run, each with its remedy."""
    model, data, optim, training = config.model, config.data, config.optim, config.training
    if config.task == "language_modeling":
        if not model.text:
            yield "model.text must describe the decoder to train (model_type, sizes), it is empty."
        if not model.decoder:
            yield "model.decoder must name the folder of the tokenizer, it is empty."
        if model.freeze_decoder:
            yield "model.freeze_decoder must be false for task language_modeling: nothing else could learn."
        if training.activation_checkpointing or training.compile:
            yield "training.activation_checkpointing and training.compile must be left out for task language_modeling."
    elif not model.decoder and not model.init_from:
        yield f"model.decoder or model.init_from must be set for task {config.task}, both are empty."
    if not data.shards:
        yield "data.shards must name a sharded dataset, it is empty. `mplug data shard` writes one."
    if data.batch_size % training.gradient_accumulation:
        yield (
            f"data.batch_size must be a multiple of training.gradient_accumulation, got {data.batch_size} and "
            f"{training.gradient_accumulation}."
        )
    if training.compile and training.zero_stage == 3:
        yield "training.compile must be false with training.zero_stage 3, which changes layers while they run."
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr must not exceed optim.lr, got {optim.min_lr} and {optim.lr}."
    if not training.steps and not training.epochs:
        yield "training.steps or training.epochs must be set, both are 0."
    if training.steps and optim.warmup_steps >= training.steps:
        yield f"optim.warmup_steps must be below training.steps, got {optim.warmup_steps} and {training.steps}."
    if data.crop_aspect[0] > data.crop_aspect[1]:
        yield f"data.crop_aspect must be [narrowest, widest], got {list(data.crop_aspect)}."
    vision = model.vision
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
        size, unit = getattr(vision, whole), getattr(vision, part)
        if size % unit:
            yield f"model.vision.{whole} must be a multiple of model.vision.{part}, got {size} and {unit}."


def load(source: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a preset by name or a YAML file, applies `dotted.key=value` overrides, and checks everything.

    Raises ConfigError with one line per problem.
    """
    tree = _read(source)
    problems: list[str] = []
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            problems.append(f"override must be dotted.key=value, got {override!r}.")
            continue
        try:
            # YAML reads nothing as null; on a command line `key=` means the empty string
            parsed = yaml.load(value, YamlLoader) if value else ""
        except yaml.YAMLError:
            problems.append(f"{key} must be given a YAML value, got {value!r}.")
            continue
        _assign(tree, key.strip().split("."), parsed, problems)
    return _validated(tree, problems)


def parse(tree: dict[str, Any]) -> RunConfig:
    """Checks a configuration that was saved with a model."""
    return _validated(tree, [])


def in_steps(config: RunConfig, clips: int) -> RunConfig:
    """The same run with its epochs counted in optimizer steps over a dataset of `clips`."""
    per_epoch = clips // config.data.batch_size
    steps = config.training.steps or int(config.training.epochs * per_epoch)
    warmup = config.optim.warmup_steps or int(config.optim.warmup_epochs * per_epoch)
    if steps <= warmup:
        raise ConfigError(
            f"a run over {clips} clips in batches of {config.data.batch_size} has {steps} steps, {warmup} of them "
            "warm-up; some must be left. Lower data.batch_size or the warm-up, or train for more epochs."
        )
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={"steps": steps, "epochs": 0}),
            "optim": config.optim.model_copy(update={"warmup_steps": warmup, "warmup_epochs": 0}),
        }
    )


def micro_batch_of(config: RunConfig, processes: int) -> tuple[int, int]:
    """Clips of one forward pass, and forward passes of all processes per step."""
    share = processes * config.training.gradient_accumulation
    if config.data.batch_size % share:
        raise ConfigError(
            f"data.batch_size must be a multiple of processes x training.gradient_accumulation = {share}, "
            f"got {config.data.batch_size}."
        )
    return config.data.batch_size // share, share


def dataset_of(name: str) -> str:
    """The dataset that a preset reads, by its task; the name of a dataset is its own."""
    if name in DATASETS.values():
        return name
    return DATASETS[load(name, ["data.shards=set-later", "model.decoder=set-later"]).task]


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads 1e-4, without a dot, as a string."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        path = PRESETS / f"{source}.yaml"
        if not path.exists():
            near = difflib.get_close_matches(str(source), presets(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"no preset named {source}: {hint}Known: {', '.join(presets())}; or give a .yaml file.")
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


def _validated(tree: dict[str, Any], problems: list[str]) -> RunConfig:
    """Validates again without each wrong leaf, so that one run names all problems, combinations included."""
    tree = _text_keys(tree)
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
    """YAML reads `on:` and `1:` as other keys than the words that stand there; JSON knows only text."""
    return {str(key): _text_keys(item) for key, item in value.items()} if isinstance(value, dict) else value
