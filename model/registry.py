"""Pipeline runs and registered models in MLflow."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from model import manifest
from model.config.schema import TrackingConfig
from model.errors import ConfigError, TrackingError
from model.lineage import find_model
from model.pipeline_run import Outcome, close_pipeline_run, create_pipeline_run, find_pipeline_run, open_pipeline_run
from model.tracking import experiment_id, mlflow_client

P = ParamSpec("P")
R = TypeVar("R")
CHAMPION = "champion"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    source: str
    """URI of the published model."""
    run_id: str
    created_ms: int
    tags: dict[str, str]
    aliases: tuple[str, ...]


def _one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Converts MLflow's exceptions into a TrackingError: a stage cannot do its work without these calls."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            raise TrackingError(f"MLflow: {' '.join(str(error).split())[:300]}") from error

    return call


def _all_pages(search: Callable[..., Any], *arguments: str) -> list[Any]:
    """The results of a search, which MLflow returns in pages."""
    found, token = list[Any](), None
    while token != "":
        page = search(*arguments, page_token=token)
        found += page
        token = page.token or ""
    return found


@_one_line
def start_pipeline_run(uri: str, experiment: str, name: str, params: Mapping[str, str]) -> None:
    """Opens the MLflow run of a pipeline, if a tracking server is configured."""
    if uri:
        server = mlflow_client(uri)
        open_pipeline_run(server, experiment_id(server, experiment), name, params)


@_one_line
def finish_pipeline_run(
    uri: str, experiment: str, name: str, last_stages: Sequence[str], outcome: Outcome | None
) -> str:
    """Closes the MLflow run of a pipeline, which is created if it was never opened. Returns the outcome in one line."""
    if not uri:
        return f"{name} has ended: {outcome or 'no tracking server is configured'}."
    server = mlflow_client(uri)
    within = experiment_id(server, experiment)
    found = find_pipeline_run(server, within, name)
    found = found or server.get_run(create_pipeline_run(server, within, name, None))
    return f"{name} has ended: {close_pipeline_run(server, found, last_stages, outcome)}."


@_one_line
def register_model(uri: str, name: str, model: str, tags: Mapping[str, str]) -> str:
    """Registers a published model by reference as a new version with the alias `candidate`.

    A manifest is registered once: a repeated call returns the existing version.
    """
    server = mlflow_client(uri)
    facts = manifest.read_manifest(model)
    all_tags = {"manifest_sha256": manifest.manifest_sha256(model), **tags}
    try:
        server.create_registered_model(name)
    except MlflowException:  # it exists
        for known in list_versions(uri, name):
            if known.tags.get("manifest_sha256") == all_tags["manifest_sha256"]:
                for key, value in all_tags.items():
                    if known.tags.get(key) != value:  # it was evaluated again
                        server.set_model_version_tag(name, known.number, key, value)
                server.set_registered_model_alias(name, "candidate", known.number)
                return known.number
    run_id, model_id = facts["run_id"] or None, None
    if run_id and (linked := find_model(server, server.get_run(run_id).info.experiment_id, model)):
        model_id = all_tags["model_id"] = linked.model_id  # MLflow links the model to its versions, but not back
    version = server.create_model_version(name, model, run_id=run_id, model_id=model_id, tags=all_tags).version
    server.set_registered_model_alias(name, "candidate", version)
    return str(version)


@_one_line
def check_tracking(uri: str) -> str:
    """Writes a run with a metric, reads it and removes it. Returns the version of the client."""
    server = mlflow_client(uri)
    run = server.create_run(experiment_id(server, "mplug-doctor"), tags={"mlflow.runName": "doctor"}).info.run_id
    server.log_metric(run, "answer", 42.0)
    found = server.get_run(run).data.metrics.get("answer")
    server.delete_run(run)
    if found != 42.0:
        raise TrackingError(f"MLflow at {uri} must return 42 for a metric of 42, got {found}.")
    return str(mlflow.version.VERSION)


@_one_line
def set_champion(uri: str, name: str, version: str) -> None:
    """Gives a version the alias `champion`. Only model/evaluation/promotion.py, which records it, calls this."""
    mlflow_client(uri).set_registered_model_alias(name, CHAMPION, version)


@_one_line
def find_champion(uri: str, name: str) -> Version | None:
    """The champion; None if there is none."""
    return next((version for version in list_versions(uri, name) if CHAMPION in version.aliases), None)


def find_version(uri: str, reference: str) -> Version:
    """The version that name/3, name@alias or a name, for its newest version, refers to. Raises ConfigError."""
    name, number, alias = reference, "", ""
    if "@" in reference:
        name, _, alias = reference.partition("@")
    elif "/" in reference:
        name, _, number = reference.partition("/")
    known = list_versions(uri, name)
    if not known:
        raise ConfigError(f"no registered model named {name}. Known: {', '.join(list_names(uri)) or 'none'}.")
    for version in known:
        if version.number == number or alias in version.aliases or not (number or alias):
            return version
    aliases = [f"@{each}" for version in known for each in version.aliases]
    numbers = [f"/{version.number}" for version in known]
    raise ConfigError(f"{reference} does not exist. Known: {', '.join([*aliases, *numbers])}.")


@_one_line
def tagged_runs(uri: str, run_id: str, tag: str) -> list[str]:
    """The values of a tag of a run, of its children, and of the runs that evaluated its model. Raises ConfigError."""
    server = mlflow_client(uri)
    run = server.get_run(run_id)
    related = [f"tags.`mlflow.parentRunId` = '{run_id}'"]
    if model := run.data.tags.get("model_uri"):
        related.append(f"params.model = '{model}'")
    found = [each for wanted in related for each in server.search_runs([run.info.experiment_id], wanted)]
    values = dict.fromkeys(each.data.tags[tag] for each in [run, *found] if tag in each.data.tags)
    if not values:
        raise ConfigError(f"run {run_id} has no {tag}. `mplug evaluate --out` stores one.")
    return list(values)


@_one_line
def list_names(uri: str) -> list[str]:
    """The names of all registered models."""
    return [model.name for model in _all_pages(mlflow_client(uri).search_registered_models)]


@_one_line
def list_versions(uri: str, name: str) -> list[Version]:
    """The versions of a model, newest first; empty if it does not exist."""
    server = mlflow_client(uri)
    found = _all_pages(server.search_model_versions, f"name = '{name}'")
    if not found:
        return []
    aliases: dict[str, list[str]] = {}
    for alias, number in server.get_registered_model(name).aliases.items():
        aliases.setdefault(str(number), []).append(alias)
    versions = [
        Version(
            name=name,
            number=str(each.version),
            source=each.source,
            run_id=each.run_id or "",
            created_ms=each.creation_timestamp,
            tags=dict(each.tags),
            aliases=tuple(sorted(aliases.get(str(each.version), []))),
        )
        for each in found
    ]
    return sorted(versions, key=lambda version: -int(version.number))


@_one_line
def attach_artifacts(config: TrackingConfig, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
    """Adds files and final metrics to the MLflow run of the pipeline."""
    server = mlflow_client(config.uri) if config.uri and config.pipeline else None
    found = find_pipeline_run(server, experiment_id(server, config.experiment), config.pipeline) if server else None
    if server and found:
        for path in paths:
            server.log_artifact(found.info.run_id, str(path))
        now_ms = int(time.time() * 1000)
        server.log_batch(found.info.run_id, metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()])
