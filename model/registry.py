"""What outlives single runs in MLflow: a pipeline's own run, and registered models."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from model import manifest
from model.config import TrackingError
from model.config_sections import TrackingConfig
from model.tracking import client, experiment_id

P = ParamSpec("P")
R = TypeVar("R")
PIPELINE_TAG = "mplug.pipeline"
CHAMPION = "champion"


def _one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Turns what MLflow raises into a TrackingError: these calls are what a stage is for, so an outage ends it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            raise TrackingError(f"MLflow: {' '.join(str(error).split())[:300]}") from error

    return call


@_one_line
def pipeline_run(uri: str, experiment: str, name: str, params: Mapping[str, str]) -> str:
    """The parent run of a pipeline, opened or opened again: runs of one name continue each other.

    Empty where no tracking server is configured.
    """
    if not uri:
        return ""
    server = client(uri)
    found = find_pipeline_run(server, experiment, name)
    if found:
        server.update_run(found, "RUNNING")
        return found
    tags = {"mlflow.runName": name, PIPELINE_TAG: name}
    run_id: str = server.create_run(experiment_id(server, experiment), tags=tags).info.run_id
    server.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    return run_id


@_one_line
def finish_pipeline_run(uri: str, experiment: str, name: str, last_stages: Sequence[str]) -> str:
    """Closes a pipeline's run by the newest run of each of its stages; says what became of it in a line."""
    server = client(uri) if uri else None
    found = find_pipeline_run(server, experiment, name) if server else ""
    if not server or not found:
        return f"{name} has ended; there is no tracking server to tell."
    of_it = f"tags.`mlflow.parentRunId` = '{found}'"
    stages = server.search_runs([experiment_id(server, experiment)], of_it, order_by=["attributes.start_time ASC"])
    newest = {run.info.run_name: run.info.status for run in stages}
    missing = [stage for stage in last_stages if stage not in newest]
    failed = sorted(stage for stage, status in newest.items() if status != "FINISHED")
    server.set_tag(found, "pipeline.failed", " ".join(failed))
    server.set_tag(found, "pipeline.missing", " ".join(missing))
    server.set_terminated(found, "FAILED" if failed or missing else "FINISHED")
    said = f"failed: {', '.join(failed) or 'nothing'}; never started: {', '.join(missing) or 'nothing'}"
    return f"{name} has ended; {said}."


def find_pipeline_run(server: mlflow.MlflowClient, experiment: str, name: str) -> str:
    """Id of a pipeline's run, or nothing."""
    runs = server.search_runs([experiment_id(server, experiment)], f"tags.`{PIPELINE_TAG}` = '{name}'", max_results=1)
    return runs[0].info.run_id if runs else ""


@_one_line
def register(uri: str, name: str, model: str, tags: Mapping[str, str]) -> str:
    """Registers a published model by reference as a new version with the alias `candidate`.

    The same manifest is registered once: a repeated call returns the version that has it.
    """
    server = client(uri)
    facts = manifest.read(model)
    all_tags = {"manifest_sha256": manifest.sha256_of(model), **tags}
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
def try_out(uri: str) -> str:
    """Writes a run with a metric, reads it and removes it; returns the server's version."""
    server = client(uri)
    run = server.create_run(experiment_id(server, "mplug-doctor"), tags={"mlflow.runName": "doctor"}).info.run_id
    server.log_metric(run, "answer", 42.0)
    found = server.get_run(run).data.metrics.get("answer")
    server.delete_run(run)
    if found != 42.0:
        raise TrackingError(f"MLflow at {uri} has given back {found} for a metric of 42.")
    return str(mlflow.version.VERSION)


@_one_line
def promote(uri: str, name: str, version: str) -> None:
    """Makes a version the one in use."""
    client(uri).set_registered_model_alias(name, CHAMPION, version)


@_one_line
def champion_scores(uri: str, name: str) -> dict[str, float]:
    """Test metrics of the version in use; empty where there is none."""
    found = [model for model in client(uri).search_registered_models(f"name = '{name}'") if CHAMPION in model.aliases]
    if not found:
        return {}
    tags = client(uri).get_model_version_by_alias(name, CHAMPION).tags
    return {key.removeprefix("test."): float(value) for key, value in tags.items() if key.startswith("test.")}


@_one_line
def attach_artifacts(config: TrackingConfig, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
    """Puts files and final metrics on the page of the pipeline's own run."""
    if config.uri and config.parent_run:
        server = client(config.uri)
        for path in paths:
            server.log_artifact(config.parent_run, str(path))
        now_ms = int(time.time() * 1000)
        server.log_batch(config.parent_run, metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()])
