"""MLflow runs that never affect the training they describe.

Everything is written to a local journal first. A background thread sends it to the server in order. A server that is
slow, down or returns garbage delays the display, never the run. Once the server answers again, or a restarted run
reaches it, it receives the missing entries, none of them twice. Only this file, lineage.py, registry.py and
pipeline_run.py import mlflow, and only if a server is configured: the import takes 0.8 s, and one process per run talks
to the server.
"""

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import lineage
from model.config.schema import TrackingConfig
from model.errors import TERMINATED, exit_codes
from model.manifest import cache_folder
from model.pipeline_run import close_after_retry, find_pipeline_run, reopen

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

log = logging.getLogger("mplug")
SEND_EVERY_S = 2.0
SHORT_PATIENCE_S = 10.0
"""Patience of a failed run. Its restart sends the missing entries."""
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 500
"""MLflow's limits per request."""
RUN_TAG = "mplug.run"
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
"""Error codes of requests that would fail again."""
Point = dict[str, Any]
"""`step`, `time_ms` and the metrics of one moment."""
Operation = Callable[["MlflowClient", str], None]
"""A request about the run with this id."""


class Run:
    """One MLflow run, or only its journal if no tracking server is configured.

    `key` identifies the run in MLflow. An existing run with this key is resumed, and its points are not sent again.
    """

    def __init__(
        self,
        config: TrackingConfig,
        name: str,
        key: str = "",
        history: Iterable[Point] = (),
        description: str = "",
    ) -> None:
        self.name, self.key, self.config = name, key or uuid.uuid4().hex, config
        self.description = description
        self.journal = cache_folder() / "journal" / f"{name}-{os.getpid()}-{time.time_ns()}.jsonl"
        self.lines: list[str] = []
        """The metrics so far, in the format of the journal."""
        self.client = mlflow_client(config.uri) if config.uri else None
        self.run_id, self.pipeline_id = "", ""
        self.sent: dict[str, int] = {}
        """Last step of each metric that was sent by an earlier process."""
        self.resumed = False
        self.outbox: deque[Point | Operation] = deque()
        self.opened, self.stopped, self.deadline = threading.Event(), threading.Event(), math.inf
        self.is_silent = False
        for point in history:
            self._record(point)
        self.sender = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self.sender.start()

    def params(self, values: Mapping[str, Any]) -> None:
        if not self.client:
            return
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), MAX_PARAMS):
            part = params[start : start + MAX_PARAMS]
            self._later(lambda server, run_id, part=part: server.log_batch(run_id, params=part))  # type: ignore[misc]

    def tags(self, values: Mapping[str, str]) -> None:
        if not self.client:
            return
        tags = _run_tags(values)
        self._later(lambda server, run_id: server.log_batch(run_id, tags=tags))

    def artifact(self, path: Path) -> None:
        """Uploads the current content of a file as an artifact."""
        data = path.read_bytes()

        def send(server: "MlflowClient", run_id: str) -> None:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / path.name
                copy.write_bytes(data)
                server.log_artifact(run_id, str(copy))

        self._later(send)

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Logs a table as the artifact `name`.json."""
        if rows:
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            self._later(lambda server, run_id: server.log_table(run_id, columns, f"{name}.json"))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Writes finite values to the journal and returns without waiting for the server."""
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        self._record({"step": step, "time_ms": int(time.time() * 1000), **finite})

    def dataset(self, name: str, digest: str, uri: str, context: str) -> None:
        """A data set that the run reads, for "training" or "evaluation"."""
        self._later(lambda server, run_id: lineage.log_dataset(server, run_id, name, digest, uri, context))

    def model(self, uri: str, step: int, params: Mapping[str, Any]) -> None:
        """The published model that the run has made."""
        texts = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in params.items()}
        self._later(lambda server, run_id: lineage.log_model(server, run_id, uri, self.name, step, texts))

    def scores(self, values: Mapping[str, float], model: str, name: str, dataset: tuple[str, str]) -> None:
        """Metrics of a published model on a data set (name, digest), also for the run that made it."""
        self._record({"step": 0, "time_ms": int(time.time() * 1000), **values}, is_sent=False)
        self._later(lambda server, run_id: lineage.log_scores(server, run_id, model, name, dataset, values))

    def history(self) -> bytes:
        """The metrics so far as JSON lines."""
        return "".join(self.lines).encode()

    def opened_id(self) -> str:
        """ID of the run in MLflow; empty if the server has not answered yet."""
        if self.client:
            self.opened.wait(SHORT_PATIENCE_S)
        return self.run_id

    def finish(self, status: str) -> None:
        """Sends the remaining entries for at most `patience_s` and closes the run, unless it is another's."""
        patience_s = self.config.patience_s
        if not self.config.run:
            self._later(lambda server, run_id: server.set_terminated(run_id, status))
        if self.config.pipeline:
            self._later(lambda server, _: close_after_retry(server, self.pipeline_id) if self.pipeline_id else None)
        self.deadline = time.monotonic() + (patience_s if status == "FINISHED" else min(patience_s, SHORT_PATIENCE_S))
        self.stopped.set()
        self.sender.join()
        if self.outbox:
            log.warning("MLflow did not receive the last %d entries; metrics are in %s", len(self.outbox), self.journal)

    @property
    def is_synced(self) -> bool:
        """Whether MLflow has received everything. True if no server is configured."""
        return not self.outbox

    def skip_wait(self) -> None:
        """Makes `finish` return without waiting for the server."""
        self.deadline = 0.0

    def _record(self, point: Point, *, is_sent: bool = True) -> None:
        self.lines.append(json.dumps(point) + "\n")
        if self.client and is_sent:
            self.outbox.append(point)
        try:
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(self.lines[-1])
        except OSError as error:  # a full disk: the points are in memory and go with the next checkpoint
            log.warning("%s: %s; metrics are kept in memory", self.journal, error.strerror)

    def _later(self, operation: Operation) -> None:
        if self.client:
            self.outbox.append(operation)

    def _send_forever(self) -> None:
        while not self.stopped.wait(SEND_EVERY_S):
            self._send()
        while not self._send() and time.monotonic() < self.deadline:
            time.sleep(1)

    def _send(self) -> bool:
        """Sends all entries; False if the server does not accept them now."""
        if not self.outbox or not self.client:
            return True
        try:
            if not self.run_id:
                self._open(self.client)
                self.opened.set()
            while self.outbox:
                self._send_first(self.client)
        except Exception as error:  # in a thread nobody else would report it; a proxy may return invalid JSON
            if not self.is_silent:  # once per outage
                message = str(error)[:200] or type(error).__name__
                from mlflow.exceptions import MlflowException

                known = isinstance(error, MlflowException | OSError)
                log.warning("MLflow is unreachable, entries are kept: %s", message, exc_info=not known)
            self.is_silent = True
            return False
        if self.is_silent:
            log.warning("MLflow is reachable again")
        self.is_silent = False
        return True

    def _open(self, server: "MlflowClient") -> None:
        tags = {"mlflow.runName": self.name, RUN_TAG: self.key, **lineage.run_tags(self.description)}
        if self.config.run:
            server.log_batch(self.config.run, tags=_run_tags(tags))
            self.run_id, self.resumed = self.config.run, True
            return
        experiment = experiment_id(server, self.config.experiment)
        pipeline = find_pipeline_run(server, experiment, self.config.pipeline) if self.config.pipeline else None
        if pipeline:  # one that is retried was closed
            reopen(server, pipeline)
            self.pipeline_id = pipeline.info.run_id
        found = server.search_runs([experiment], f"tags.`{RUN_TAG}` = '{self.key}'", max_results=1)
        if found:
            server.update_run(found[0].info.run_id, "RUNNING")
            self.resumed = True
            self.run_id = found[0].info.run_id
            return
        if self.pipeline_id:
            tags["mlflow.parentRunId"] = self.pipeline_id
        self.run_id = server.create_run(experiment, tags=tags).info.run_id

    def _send_first(self, server: "MlflowClient") -> None:
        """Sends the operation at the head of the queue, or all points up to the next operation."""
        from mlflow.exceptions import MlflowException

        first = self.outbox[0]
        if not isinstance(first, dict):
            try:
                first(server, self.run_id)
            except MlflowException as error:
                if error.error_code not in REFUSED:
                    raise
                log.warning("MLflow refused an entry of run %s: %s", self.run_id, str(error)[:200])
            except (AttributeError, KeyError, TypeError):  # it would fail the same way every time
                log.exception("an entry of run %s cannot be sent", self.run_id)
            self.outbox.popleft()
            return
        points, metrics = 0, list["Metric"]()
        for entry in islice(list(self.outbox), MAX_METRICS):
            if not isinstance(entry, dict) or len(metrics) + len(entry) > MAX_METRICS:
                break
            points += 1
            metrics += self._unsent(server, entry)
        if metrics:
            server.log_batch(self.run_id, metrics=metrics)
        for _ in range(points):
            self.outbox.popleft()

    def _unsent(self, server: "MlflowClient", point: Point) -> list["Metric"]:
        from mlflow.entities import Metric

        step, time_ms = point["step"], point["time_ms"]
        keys = [key for key in point if key not in ("step", "time_ms")]
        if self.resumed:
            for key in keys:
                if key not in self.sent:
                    known = server.get_metric_history(self.run_id, key)
                    self.sent[key] = max((metric.step for metric in known), default=-1)
        return [Metric(key, point[key], time_ms, step) for key in keys if step > self.sent.get(key, -1)]


@contextmanager
def tracked(
    config: TrackingConfig, name: str, key: str = "", history: Iterable[Point] = (), description: str = ""
) -> Iterator[Run]:
    """A run whose status in MLflow follows the block: FINISHED, FAILED or KILLED."""
    run = Run(config, name, key, history, description)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, lambda *_: run.skip_wait())
        run.finish(status)
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _run_tags(values: Mapping[str, str]) -> list["RunTag"]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in values.items()]


def _terminate(_number: int, _frame: object) -> None:
    """Exits, so that the run is closed."""
    sys.exit(TERMINATED)


@contextmanager
def stage(name: str, tracking: Mapping[str, str], params: Mapping[str, Any]) -> Iterator[Run]:
    """The MLflow run of a pipeline stage that does not train. Logs its parameters; user errors become exit codes."""
    with exit_codes(), tracked(TrackingConfig(**tracking), name) as run:
        run.params(params)
        yield run


def mlflow_client(uri: str) -> "MlflowClient":
    """A client with timeouts of seconds. MLflow's default is four minutes."""
    import mlflow

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for results
    mlflow.set_tracking_uri(uri)  # artifact uploads read the global setting
    return mlflow.MlflowClient(uri)


def experiment_id(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if not experiment:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process was first
            experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in tree.items():
        items |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return items
