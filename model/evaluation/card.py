"""What a hub shows of a model: model card, scores for machines, and no address of the platform that it comes from."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from model import manifest
from model.config.load import parse_config
from model.config.schema import TrackingConfig
from model.errors import ConfigError
from model.evaluation.published import PUBLISHED
from model.evaluation.results import UNRELIABLE, Evaluation
from model.tracking import flatten

CARD, RESULTS = "README.md", "results.json"
TEMPLATE = Path(__file__).with_name("card.md.j2")
PIPELINE_TAGS = {
    "classification": "video-classification",
    "retrieval": "feature-extraction",
    "matching": "feature-extraction",
    "captioning": "video-text-to-text",
    "instruction": "video-text-to-text",
}
"""The kind of model by which hubs filter, for each task."""
FAMILIES = {
    "mplug_video": ("mplug_video", "MPlugVideoProcessor"),
    "mplug-owl": ("mplug_owl_video", "MplugOwlProcessor"),
}
"""Package and processor of each `model_type`."""
VERSION = re.compile("[0-9a-f]{12}")
PLACES = {"data": ["shards"], "evaluation": ["shards"], "model": ["decoder", "init_from", "vision_weights"]}
"""Settings that name a folder or a URI, by section."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A model as it is offered on a hub."""

    model: str
    """Folder or URI of the model."""
    repo: str
    """owner/name."""
    hub: str
    """huggingface or modelscope."""
    license: str
    """SPDX identifier."""
    evaluations: Sequence[Evaluation] = field(default_factory=list)


def write_release(release: Release, folder: Path) -> None:
    """Copies the files of the model to a folder, with a card and the scores.

    Raises ConfigError if an evaluation is of another model or must not be trusted.
    """
    model = manifest.fetch_model(release.model)
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    kind = described.get("model_type")
    if kind not in FAMILIES or not described.get("architectures"):
        raise ConfigError(f"{release.model} must be an mPLUG-Video or mPLUG-Owl, but its model_type is {kind}.")
    for evaluation in release.evaluations:
        _check(evaluation, release.model)
    facts = manifest.read_manifest(str(model)) if (model / manifest.FILE).exists() else {}
    config = _without_places(facts["config"]) if "config" in facts else {}
    names = facts.get("files") or [path.name for path in model.glob("[!.]*") if path.is_file()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, folder / name)
    results = json.dumps([_result(each) for each in release.evaluations], ensure_ascii=False, indent=1)
    (folder / RESULTS).write_text(results, encoding="utf-8")
    package, processor = FAMILIES[kind]
    ModelCard.from_template(
        _metadata(release, config),
        template_path=str(TEMPLATE),
        release=release,
        architecture=described["architectures"][0],
        package=package,
        processor=processor,
        settings=_changed(config),
        results=RESULTS,
        published=PUBLISHED,
    ).save(folder / CARD)
    kept: dict[str, Any] = {key: facts[key] for key in ("base_sha256", "source") if key in facts}
    if config:
        kept["config"] = config
    (folder / manifest.FILE).write_bytes(manifest.describe_folder(folder, **kept))


def _check(evaluation: Evaluation, model: str) -> None:
    if manifest.version_of(evaluation.model) != manifest.version_of(model):
        raise ConfigError(f"evaluations must be of {model}, but one of {evaluation.task} is of {evaluation.model}.")
    if reason := evaluation.protocol.get(UNRELIABLE):
        raise ConfigError(f"an evaluation of {evaluation.task} must not be published: {reason}.")


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without where it has read and written: of folders and URIs, their names remain."""
    public = {**config, "output": "output", "tracking": TrackingConfig().model_dump()}
    for section, keys in PLACES.items():
        public[section] = {**public[section], **{key: _name(public[section][key]) for key in keys}}
    return public


def _name(place: str) -> str:
    """The name of a folder; if that is a version, as manifest.publish_folder writes it, also the one above."""
    *_, above, name = ["", *place.split("/")]
    return f"{above}/{name}" if VERSION.fullmatch(name) else name


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    if not config:
        return {}
    required = {"data": {"shards": "-"}, "model": {"decoder": "-"}}
    defaults = flatten(parse_config(required).model_dump(mode="json"))
    return {key: value for key, value in flatten(config).items() if value != defaults.get(key)}


def _result(evaluation: Evaluation) -> dict[str, Any]:
    """The scores of an evaluation for machines."""
    names = ("task", "protocol", "scores", "intervals", "untuned", "chance", "headline", "class_names")
    return {name: getattr(evaluation, name) for name in names}


def _metadata(release: Release, config: Mapping[str, Any]) -> ModelCardData:
    """The head of the card, which hubs read."""
    tasks = dict.fromkeys([*([config["task"]] if config else []), *(each.task for each in release.evaluations)])
    return ModelCardData(
        language="zh",
        license=release.license,
        library_name="mplug-video",
        tags=["video", "mplug-video", *tasks],
        pipeline_tag=next((PIPELINE_TAGS[task] for task in tasks if task in PIPELINE_TAGS), None),
        model_name=release.repo.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=PIPELINE_TAGS[each.task],
                task_name=each.task,
                dataset_type=each.protocol["data"].partition("@")[0],
                dataset_name=each.protocol["data"],
                dataset_split=each.protocol["split"],
                dataset_args=each.protocol,
                metric_type=metric,
                metric_value=round(value, 6),
                metric_args={"interval_95": [round(bound, 6) for bound in each.intervals[metric]]},
            )
            for each in release.evaluations
            for metric, value in each.scores.items()
        ]
        or None,
    )
