"""The configuration of an evaluation: that of the model's training, or of a converted model's sizes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from model import manifest, storage
from model.config.load import override_config, read_config
from model.config.networks import VisionConfig
from model.config.schema import TASK_DATASETS, RunConfig
from model.data.shards.reader import read_dataset_info
from model.errors import ConfigError, NotFoundError
from model.mplug_video.configuration import MATCHING_CLASSES

PRESETS = {
    "classification": "classification",
    "retrieval": "retrieval",
    "matching": "retrieval_itm",
    "captioning": "captioning",
    "instruction": "instruction_bloomz_7b",
}
"""Tasks that can be evaluated, and the preset whose settings a model has that was not trained here."""


def evaluation_config(model: str, shards: str, overrides: Sequence[str], tracking: Mapping[str, str]) -> RunConfig:
    """The configuration to evaluate `model` on `shards`, with `dotted.key=value` overrides.

    The task is that of the model's training if it reads this dataset, else the dataset's own one; `task=` overrides it.
    """
    dataset, described, trained = read_dataset_info(shards)["dataset"], _described(model), _trained(model)
    task = next((item.partition("=")[2] for item in overrides if item.startswith("task=")), "")
    if not task and trained and TASK_DATASETS[trained["task"]] == dataset:
        task = trained["task"]
    task = task or ("matching" if dataset == "retrieval" and _matches(described) else dataset)
    if task not in PRESETS:
        known = ", ".join(dict.fromkeys(TASK_DATASETS[name] for name in PRESETS))
        raise ConfigError(f"an evaluation needs shards of {known}, but {shards} are of {dataset}.")
    if TASK_DATASETS[task] != dataset:
        raise ConfigError(f"task {task} needs shards of {TASK_DATASETS[task]}, but {shards} are of {dataset}.")
    tree = trained or {**read_config(PRESETS[task]), "name": f"{task}-converted"}
    tree["task"] = task
    tree.setdefault("model", {}).update(init_from=model, vision=_own_vision(described, tree["model"]))
    tree.setdefault("data", {}).update(shards=shards)
    tree["tracking"] = {**tree.get("tracking", {}), "uri": "", **tracking}
    return override_config(tree, overrides)


def trained_config(model: str) -> RunConfig | None:
    """The configuration that a model was trained with; None if it was not trained here."""
    tree = _trained(model)
    return override_config(tree, []) if tree else None


def _trained(model: str) -> dict[str, Any] | None:
    try:
        return manifest.read_manifest(model).get("config")
    except NotFoundError:  # a folder as others publish it
        return None


def _described(model: str) -> dict[str, Any]:
    """config.json of a model. Raises NotFoundError if there is none."""
    where = storage.join(model, "config.json")
    if not storage.exists(where):
        raise NotFoundError(f"{model} is no model: it has neither {manifest.FILE} nor config.json.")
    return json.loads(storage.read(where))


def _matches(described: Mapping[str, Any]) -> bool:
    return described.get("class_names") == MATCHING_CLASSES


def _own_vision(described: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`model.vision` with the sizes of the model."""
    own = {key: value for key, value in described.get("vision_config", {}).items() if key in VisionConfig.model_fields}
    return {**settings.get("vision", {}), **own}
