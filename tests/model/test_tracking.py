"""Tracking with a real MLflow server that is down, slow, returns 500 or loses responses."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pytest

from model import tracking
from model.config.schema import TrackingConfig
from model.tracking import Run, tracked
from tests.helpers.killing import Training
from tests.helpers.unreliable import Mode, Unreliable, mlflow_server


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unreliable]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as proxy:
        yield proxy
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # mlflow sets it, which would affect commands of other tests


@pytest.fixture
def server(proxy: Unreliable, monkeypatch: pytest.MonkeyPatch) -> Unreliable:
    proxy.mode = "up"
    monkeypatch.setattr(tracking, "SEND_EVERY_S", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return proxy


def config(server: Unreliable, patience_s: float = 30) -> TrackingConfig:
    return TrackingConfig(uri=server.uri, experiment="tests", patience_s=patience_s)


def log(run: Run, steps: range, wait_s: float = 0.0) -> float:
    """Logs loss = step; returns the longest duration of a call."""
    longest = 0.0
    for step in steps:
        start = time.perf_counter()
        run.metrics({"train/loss": float(step), "train/lr": 1 / step}, step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(wait_s)
    return longest


def points(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.history().splitlines()]


def series(server: Unreliable, run: Run, key: str = "train/loss") -> list[int]:
    server.mode = "up"
    points = mlflow.MlflowClient(server.uri).get_metric_history(run.run_id, key)
    assert all(point.value == point.step for point in points if key == "train/loss")
    return sorted(point.step for point in points)


def status(server: Unreliable, run: Run) -> str:
    return str(mlflow.MlflowClient(server.uri).get_run(run.run_id).info.status)


@pytest.mark.parametrize("mode", ["down", "500", "slow", "lost answers", "a page"])
@pytest.mark.parametrize("when", ["at start", "in the middle", "at the end"])
def test_an_outage_neither_delays_a_run_nor_loses_points(
    server: Unreliable, when: str, mode: Mode, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    server.mode = mode if when == "at start" else "up"
    with tracked(config(server), "outage") as run:
        run.params({"optim.lr": 1e-4})
        longest = log(run, range(1, 11), 0.02)
        server.mode = mode if when == "in the middle" else "up"
        longest = max(longest, log(run, range(11, 31), 0.05))
        server.mode = mode if when == "at the end" else "up"
        longest = max(longest, log(run, range(31, 41)))
        if when == "at the end":
            back = tracking.threading.Timer(2.0, lambda: setattr(server, "mode", "up"))
            back.start()
    assert longest < 0.1
    assert capfd.readouterr().out == ""  # stdout is reserved for the model's URI
    for key in ("train/loss", "train/lr"):
        assert series(server, run, key) == list(range(1, 41))
    assert status(server, run) == "FINISHED"
    assert mlflow.MlflowClient(server.uri).get_run(run.run_id).data.params == {"optim.lr": "0.0001"}


def test_a_lost_server_delays_only_by_the_patience(server: Unreliable, caplog: pytest.LogCaptureFixture) -> None:
    server.mode = "down"
    start = time.monotonic()
    with tracked(config(server, patience_s=1), "lost", key="lost") as run:
        log(run, range(1, 6))
    assert time.monotonic() - start < 8
    assert "MLflow did not receive the last 6 entries; metrics are in" in caplog.text
    assert caplog.text.count("MLflow is unreachable") == 1
    server.mode = "up"
    with tracked(config(server), "lost", key="lost", history=points(run)) as again:  # the same command again
        pass
    assert series(server, again) == [1, 2, 3, 4, 5]


def test_a_repeated_finished_run_sends_the_rest(
    server: Unreliable, shards: dict[str, str], decoder: str, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}", "training.steps=2"]
    settings += [f"tracking.uri={server.uri}", "tracking.experiment=late", "tracking.patience_s=1"]
    run = Training(tmp_path, settings)
    server.mode = "down"
    first = run.run(processes=1)
    assert first.code == 0
    assert "MLflow did not receive" in first.stderr
    server.mode = "up"
    again = run.run(processes=1)
    assert (again.code, again.model) == (0, first.model)
    assert "step/s" not in again.stderr
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("late")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["model_uri"] == first.model
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2]


def test_a_restarted_run_continues_the_same_series(server: Unreliable) -> None:
    killed = Run(config(server), "killed", key="killed")
    log(killed, range(1, 21))
    while killed.outbox:
        time.sleep(0.05)
    killed.stopped.set()  # like a killed process, without closing the run
    until_the_checkpoint = points(killed)[:10]
    with tracked(config(server), "killed", key="killed", history=until_the_checkpoint) as run:
        log(run, range(11, 31))
    assert run.run_id == killed.run_id
    assert series(server, run) == list(range(1, 31))
    assert status(server, run) == "FINISHED"


def test_a_restart_sends_points_delayed_by_an_outage(server: Unreliable) -> None:
    killed = Run(config(server), "held-back", key="held-back")
    log(killed, range(1, 6))
    while killed.outbox:
        time.sleep(0.05)
    server.mode = "down"
    log(killed, range(6, 11))
    killed.stopped.set()
    killed.deadline = 0.0
    killed.sender.join()
    server.mode = "up"
    with tracked(config(server), "held-back", key="held-back", history=points(killed)) as run:
        log(run, range(11, 13))
    assert series(server, run) == list(range(1, 13))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_the_status_shows_how_a_run_ended(server: Unreliable, error: type[BaseException] | None, expected: str) -> None:
    with pytest.raises(error) if error else nullcontext(), tracked(config(server), "ends") as run:
        if error:
            raise error
    assert status(server, run) == expected


def test_many_parameters_and_rejected_entries(server: Unreliable, caplog: pytest.LogCaptureFixture) -> None:
    with tracked(config(server), "many") as run:
        run.params({f"p{number}": number for number in range(250)})
        run.params({"p1": "another value"})
        run.metrics({"train/loss": 1.0, "train/grad_norm": math.inf}, 1)
    found = mlflow.MlflowClient(server.uri).get_run(run.run_id).data
    assert len(found.params) == 250
    assert found.metrics == {"train/loss": 1.0}
    assert "MLflow refused an entry" in caplog.text


def test_pictures_and_tables_arrive_after_an_outage(server: Unreliable, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    server.mode = "down"
    with tracked(config(server), "pictures") as run:
        run.artifact(picture)
        picture.unlink()
        run.table([{"text": "小猫"}], "predictions")
        server.mode = "up"
    found = {item.path for item in mlflow.MlflowClient(server.uri).list_artifacts(run.run_id)}
    assert found == {"picture.png", "predictions.json"}


def test_a_full_disk_only_loses_the_journal(
    server: Unreliable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("MPLUG_CACHE", str(tmp_path / "cache"))
    with tracked(config(server), "full") as run:
        log(run, range(1, 4))
    assert "metrics are kept in memory" in caplog.text
    assert series(server, run) == [1, 2, 3]
    assert run.history().count(b"\n") == 3
