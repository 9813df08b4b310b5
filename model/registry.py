"""Pipeline runs and registered models in MLflow."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from model import manifest
from model.config.schema import TrackingConfig
from model.errors import TrackingError
from model.pipeline_run import Outcome, close_pipeline_run, create_pipeline_run, find_pipeline_run, open_pipeline_run
from model.tracking import experiment_id, mlflow_client

P = ParamSpec("P")
R = TypeVar("R")
CHAMPION = "champion"


def _one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Converts MLflow's exceptions into a TrackingError: a stage cannot do its work without these calls."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            raise TrackingError(f"MLflow: {' '.join(str(error).split())[:300]}") from error

    return call


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
        for known in server.search_model_versions(f"name = '{name}'"):
            if known.tags.get("manifest_sha256") == all_tags["manifest_sha256"]:
                server.set_registered_model_alias(name, "candidate", known.version)
                return str(known.version)
    version = server.create_model_version(name, source=model, run_id=facts["run_id"] or None, tags=all_tags).version
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
def promote_model(uri: str, name: str, version: str) -> None:
    """Gives a version the alias `champion`."""
    mlflow_client(uri).set_registered_model_alias(name, CHAMPION, version)


@_one_line
def champion_scores(uri: str, name: str, split: str) -> dict[str, float]:
    """Metrics of the champion on a split; empty if there is no champion."""
    server = mlflow_client(uri)
    if not any(CHAMPION in model.aliases for model in server.search_registered_models(f"name = '{name}'")):
        return {}
    tags = server.get_model_version_by_alias(name, CHAMPION).tags
    return {key.removeprefix(f"{split}."): float(value) for key, value in tags.items() if key.startswith(f"{split}.")}


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
