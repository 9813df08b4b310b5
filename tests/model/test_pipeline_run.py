"""Status of a pipeline's run in a real MLflow after success, failure, cancellation and retry."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from model import registry
from model.pipeline_run import CONTINUES, LAST_STAGES, RUN_ID, find_pipeline_run
from model.tracking import experiment_id, stage

EXPERIMENT, NAME = "tests", "nightly"
LAST = ["gate", "register"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[mlflow.MlflowClient]:
    yield mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def uri(server: mlflow.MlflowClient) -> str:
    return str(server.tracking_uri)


def start(uri: str) -> None:
    registry.start_pipeline_run(uri, EXPERIMENT, NAME, {"root": "s3://x"})


def run_stages(uri: str, *names: str, fails: bool = False) -> None:
    for name in names:
        try:
            with stage(name, {"uri": uri, "experiment": EXPERIMENT, "pipeline": NAME}, {}):
                if fails:
                    raise ValueError(name)
        except ValueError:
            pass


def newest(server: mlflow.MlflowClient) -> mlflow.entities.Run:
    found = find_pipeline_run(server, experiment_id(server, EXPERIMENT), NAME)
    assert found
    return found


def finish(uri: str, outcome: str | None = None) -> str:
    return registry.finish_pipeline_run(uri, EXPERIMENT, NAME, LAST, outcome)  # type: ignore[arg-type]


def test_a_pipeline_has_finished_with_its_last_stages(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, "train", *LAST)
    assert finish(uri) == "nightly has ended: succeeded."
    first = newest(server)
    assert first.info.status == "FINISHED"
    start(uri)  # again with the same name
    assert newest(server).info.run_id == first.info.run_id
    assert newest(server).info.status == "RUNNING"
    assert LAST_STAGES not in newest(server).data.tags


def test_failed_and_unstarted_stages_are_named(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, "train")
    run_stages(uri, "gate", fails=True)
    assert finish(uri) == "nightly has ended: failed; failed: gate; never started: register."
    assert newest(server).info.status == "FAILED"
    assert newest(server).data.tags["pipeline.failed"] == "gate"


def test_a_cancelled_pipeline_and_its_stage_are_killed(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    tags = {"mlflow.parentRunId": newest(server).info.run_id, "mlflow.runName": "evaluate"}
    cut_off = server.create_run(experiment_id(server, EXPERIMENT), tags=tags).info.run_id
    assert finish(uri, "cancelled").startswith("nightly has ended: cancelled; failed: evaluate;")
    assert newest(server).info.status == "KILLED"
    assert server.get_run(cut_off).info.status == "KILLED"


def test_the_workflow_status_takes_precedence(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, *LAST)
    finish(uri, "failed")  # a driver, which has no MLflow run
    assert newest(server).info.status == "FAILED"


def test_a_reused_name_does_not_hide_a_failure(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, "gate", fails=True)
    finish(uri, "failed")
    failed = newest(server)
    start(uri)
    assert newest(server).data.tags[CONTINUES] == failed.info.run_id
    run_stages(uri, *LAST)
    finish(uri, "succeeded")
    assert newest(server).info.status == "FINISHED"
    assert server.get_run(failed.info.run_id).info.status == "FAILED"


def test_a_cached_last_stage_counts(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, *LAST)
    run_stages(uri, "train", fails=True)
    finish(uri)
    start(uri)
    run_stages(uri, "train")
    assert finish(uri) == "nightly has ended: succeeded."


def test_the_status_follows_a_retry_without_exit_handler(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, "train", fails=True)
    finish(uri, "failed")
    with stage("train", {"uri": uri, "experiment": EXPERIMENT, "pipeline": NAME}, {"seed": 1}) as run:
        run.opened_id()
        assert newest(server).info.status == "RUNNING"
    assert newest(server).info.status == "RUNNING"  # the last stages have not run yet
    run_stages(uri, "gate")
    run_stages(uri, "register", fails=True)
    assert newest(server).info.status == "FAILED"
    run_stages(uri, "register")
    assert newest(server).info.status == "FINISHED"
    assert newest(server).data.tags["pipeline.failed"] == ""


def test_two_kubeflow_runs_with_one_name_are_independent(
    server: mlflow.MlflowClient, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_ID, "a")
    start(uri)
    first = newest(server)
    monkeypatch.setenv(RUN_ID, "b")
    start(uri)
    run_stages(uri, "train")
    monkeypatch.setenv(RUN_ID, "a")
    run_stages(uri, "gate", fails=True)
    finish(uri, "failed")
    assert newest(server).info.run_id == first.info.run_id
    monkeypatch.setenv(RUN_ID, "b")
    assert newest(server).info.run_id != first.info.run_id
    assert newest(server).info.status == "RUNNING"
    run_stages(uri, *LAST)
    finish(uri, "succeeded")
    assert newest(server).info.status == "FINISHED"
    assert server.get_run(first.info.run_id).info.status == "FAILED"


def test_an_unopened_run_does_not_close_an_earlier_one(
    server: mlflow.MlflowClient, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_ID, "a")
    start(uri)
    run_stages(uri, *LAST)
    finish(uri, "succeeded")
    first = newest(server)
    monkeypatch.setenv(RUN_ID, "b")
    finish(uri, "cancelled")  # before its first step
    assert newest(server).info.status == "KILLED"
    assert server.get_run(first.info.run_id).info.status == "FINISHED"
    start(uri)  # a retry
    run_stages(uri, *LAST)
    assert newest(server).info.status == "FINISHED"


def test_a_cancelled_retry_is_killed(server: mlflow.MlflowClient, uri: str) -> None:
    start(uri)
    run_stages(uri, "train", fails=True)
    finish(uri, "failed")
    with pytest.raises(SystemExit), stage("train", {"uri": uri, "experiment": EXPERIMENT, "pipeline": NAME}, {"a": 1}):
        raise SystemExit(143)
    assert newest(server).info.status == "KILLED"
