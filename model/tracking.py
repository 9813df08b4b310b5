"""MLflow: runs that cannot hurt a training run, and the registry. The only file that imports mlflow.

One parent run per pipeline, one child per stage; models are registered by reference. Metrics go to a local journal
first and reach MLflow from a background thread: a server that is slow or down delays the picture, never the run. What
could not be sent is sent again: points carry their time, so a repeated one is the same.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from model import manifest
from model.config import TrackingConfig, TrackingError
from model.manifest import cache_folder

log = logging.getLogger("mplug")
SEND_EVERY_S = 2.0
FINAL_ATTEMPTS = 5
MAX_PARAM_LENGTH = 500
PIPELINE_TAG = "mplug.pipeline"
TERMINATED = 143
"""Exit code of a process that was asked to end."""


class Run:
    """One MLflow run, or only its journal where no tracking server is configured."""

    def __init__(self, config: TrackingConfig, name: str, journal: Path) -> None:
        self.journal = journal
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        self.pending: list[Metric] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.client = client(config.uri) if config.uri else None
        self.run_id = ""
        if self.client:
            tags = {"mlflow.runName": name}
            if config.parent_run:
                tags["mlflow.parentRunId"] = config.parent_run
            try:
                run = self.client.create_run(experiment_id(self.client, config.experiment), tags=tags)
            except MlflowException as error:
                raise TrackingError(f"MLflow at {config.uri} did not open a run: {str(error)[:200]}") from error
            self.run_id = run.info.run_id
        self.sender = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self.sender.start()

    def params(self, values: Mapping[str, Any]) -> None:
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        self._try("log_batch", params=params)

    def tags(self, values: Mapping[str, str]) -> None:
        self._try("log_batch", tags=[RunTag(key, value) for key, value in values.items()])

    def artifact(self, path: Path) -> None:
        self._try("log_artifact", str(path))

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """A table that MLflow's page shows under `name`.json."""
        if rows:
            self._try("log_table", {key: [row[key] for row in rows] for key in rows[0]}, f"{name}.json")

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Writes to the journal and returns; the sender does the rest."""
        now_ms = int(time.time() * 1000)
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time_ms": now_ms, **values}) + "\n")
        if self.client:
            with self.lock:
                self.pending += [Metric(key, float(value), now_ms, step) for key, value in values.items()]

    def finish(self, status: str) -> None:
        self.stopped.set()
        self.sender.join()
        for attempt in range(FINAL_ATTEMPTS):
            if self._send():
                break
            time.sleep(2**attempt)
        else:
            log.warning("%d points did not reach MLflow; they are in %s", len(self.pending), self.journal)
        self._try("set_terminated", status)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Calls the server; a failure is said and costs what was to be shown, never the run."""
        if self.client:
            try:
                getattr(self.client, method)(self.run_id, *args, **kwargs)
            except (MlflowException, OSError) as error:
                log.warning("MLflow did not take %s of run %s: %s", method, self.run_id, str(error)[:200])

    def _send_forever(self) -> None:
        while not self.stopped.wait(SEND_EVERY_S):
            self._send()

    def _send(self) -> bool:
        with self.lock:
            batch = self.pending[:1000]
        if not batch or not self.client:
            return True
        try:
            self.client.log_batch(self.run_id, metrics=batch)
        except MlflowException as error:
            log.warning("MLflow is not reachable, %d points wait: %s", len(self.pending), str(error)[:200])
            return False
        with self.lock:
            del self.pending[: len(batch)]
        return not self.pending or self._send()


@contextmanager
def tracked(config: TrackingConfig, name: str) -> Iterator[Run]:
    """A run whose status in MLflow says how it ended: FINISHED, FAILED or KILLED."""
    run = Run(config, name, cache_folder() / "journal" / f"{name}-{os.getpid()}-{time.time_ns()}.jsonl")
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        run.finish("KILLED")
        raise
    except BaseException:
        run.finish("FAILED")
        raise
    else:
        run.finish("FINISHED")
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _terminate(_number: int, _frame: object) -> None:
    """A terminated process closes its run on the way out."""
    sys.exit(TERMINATED)


@contextmanager
def stage(name: str, tracking: Mapping[str, str], params: Mapping[str, Any]) -> Iterator[Run]:
    """The run of a pipeline stage that does not train, with its parameters logged."""
    with tracked(TrackingConfig(**tracking), name) as run:
        run.params(params)
        yield run


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


def finish_pipeline_run(uri: str, experiment: str, name: str, *, succeeded: bool) -> None:
    if not uri:
        return
    server = client(uri)
    if found := find_pipeline_run(server, experiment, name):
        server.set_terminated(found, "FINISHED" if succeeded else "FAILED")


def find_pipeline_run(server: mlflow.MlflowClient, experiment: str, name: str) -> str:
    """Id of a pipeline's run, or nothing."""
    runs = server.search_runs([experiment_id(server, experiment)], f"tags.`{PIPELINE_TAG}` = '{name}'", max_results=1)
    return runs[0].info.run_id if runs else ""


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


def client(uri: str) -> mlflow.MlflowClient:
    """A client that gives up on a silent server after seconds; its default is four minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(uri)  # artifact uploads read the global setting
    return mlflow.MlflowClient(uri)


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return str(experiment.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process was first
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        return str(experiment.experiment_id)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[prefix + key] = value
    return items


def attach_artifacts(config: TrackingConfig, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
    """Puts files and final metrics on the page of the pipeline's own run."""
    if config.uri and config.parent_run:
        server = client(config.uri)
        for path in paths:
            server.log_artifact(config.parent_run, str(path))
        now_ms = int(time.time() * 1000)
        server.log_batch(config.parent_run, metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()])
