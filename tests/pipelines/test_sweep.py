"""Sweeps: what is searched, trials as jobs on a cluster in memory, and an interrupted sweep on this machine."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from model.config.load import load_config
from model.errors import ConfigError, StageError
from model.tracking import Run
from pipelines.sweep import Machines, Sweep, run_sweep, split_settings
from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.paths import MPLUG
from tests.helpers.pod_templates import CPU

METRIC = "val/loss"


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kube(tmp_path / "kubeconfig") as server:
        server.put("podtemplates", CPU)
        yield server


def test_ranges_and_choices_are_searched_and_other_settings_are_fixed() -> None:
    fixed, space = split_settings(
        [
            "optim.lr=1e-5..1e-3:log",
            "data.crop_area=0.5..1",
            "training.steps=100..400",
            "optim.schedule=cosine,linear",
            "model.freeze_vision=true,false",
            "optim.betas=[0.9,0.98]",
            "data.shards=../shards",
        ]
    )
    assert fixed == ["optim.betas=[0.9,0.98]", "data.shards=../shards"]
    assert space == {
        "optim.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "data.crop_area": FloatDistribution(0.5, 1),
        "training.steps": IntDistribution(100, 400),
        "optim.schedule": CategoricalDistribution(["cosine", "linear"]),
        "model.freeze_vision": CategoricalDistribution([True, False]),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.lr=1..1e-3"], "optim.lr must be searched from a lower to a higher value"),
        (["optim.lr=0..1:log"], "above 0 with :log"),
        (["optim.lr=1e-3,[1]"], "optim.lr must be searched among numbers, words or true and false"),
        (["optim.lr=1e-3,-1"], "optim.lr: input should be greater than 0"),
        (["optim.nothing=1,2"], "optim.nothing"),
        (["optim.lr=1e-4,1e-3", "name=It's"], "name"),
        (["optim.lr=1e-3"], "a sweep needs a setting to search"),
        (["optim.lr=1e-4,1e-3", "evaluation.every=0"], "evaluation.every must be set"),
        (["optim.lr=1e-4,1e-3", "tracking.uri="], "tracking.uri must name the MLflow server"),
    ],
)
def test_every_setting_is_checked_before_the_first_trial(settings: list[str], message: str) -> None:
    common = ["data.shards=s", "model.decoder=d", "evaluation.every=1", "tracking.uri=sqlite:///nothing"]
    with pytest.raises(ConfigError, match=message):
        run_sweep(Sweep(config="tiny_decoder", settings=[*common, *settings], trials=1))


class Pods(threading.Thread):
    """The operator and the pods: each job logs a validation loss to the run of its trial, and ends."""

    def __init__(self, kube: FakeKube, losses: list[float], failing: set[int], endless: set[int]) -> None:
        super().__init__(daemon=True)
        self.kube, self.losses, self.failing, self.endless = kube, losses, failing, endless
        self.seen: dict[int, list[str]] = {}
        """Arguments of the job of each trial."""

    def run(self) -> None:
        while len(self.seen) < len(self.losses):
            with self.kube.changed:
                jobs = [item for (_, kind, _), item in self.kube.objects.items() if kind == "pytorchjobs"]
            for job in jobs:
                (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
                config = load_config(container["args"][1], container["args"][2:])
                number = int(config.name.rpartition("-")[2])
                if number not in self.seen:
                    self.seen[number] = container["args"]
                    run = Run(config.tracking, config.name)
                    run.params({"optim.lr": config.optim.lr})
                    run.tags({"model_uri": f"model-{number}"})
                    run.metrics({METRIC: self.losses[number]}, 10)
                    run.finish("FINISHED")
                    if number not in self.endless:
                        end = "Failed" if number in self.failing else "Succeeded"
                        self.kube.conclude("pytorchjobs", job["metadata"]["name"], end)
            time.sleep(0.1)


def test_trials_are_jobs_and_bad_ones_are_stopped(kube: FakeKube, uri: str) -> None:
    settings = [
        "data.shards=s",
        "model.decoder=d",
        "evaluation.every=10",
        f"tracking.uri={uri}",
        "tracking.experiment=s",
        "optim.lr=1e-4..1e-2:log",
    ]
    sweep = Sweep(
        config="tiny_decoder",
        settings=settings,
        name="search",
        trials=7,
        machines=Machines(parallel=2, nodes=1, namespace="mplug"),
    )
    pods = Pods(kube, [1.0, 1.1, 1.2, 1.3, 0.9, 6.0, 0.5], failing={4}, endless={5})
    pods.start()
    found = run_sweep(sweep)
    assert [(each.number, each.value, each.model) for each in found] == [
        (6, 0.5, "model-6"),
        *((number, pods.losses[number], f"model-{number}") for number in range(4)),
    ]
    assert "tracking.run=" in " ".join(pods.seen[0])
    names = {name for _, kind, name in kube.objects if kind == "pytorchjobs"}
    assert len(names) == 6, "the job of the trial that was stopped is removed"

    server = mlflow.MlflowClient(uri)
    (experiment,) = [each.experiment_id for each in server.search_experiments() if each.name == "s"]
    runs = {run.info.run_name: run for run in server.search_runs([experiment])}
    parent = runs["search"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_trial"] == "6"
    assert parent.data.metrics[METRIC] == 0.5
    children = [runs[f"search-{number}"] for number in range(7)]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.status for run in children] == [*["FINISHED"] * 4, "FAILED", "KILLED", "FINISHED"]
    for number, run in enumerate(children):  # Optuna and the training write the same text
        assert f"optim.lr={run.data.params['optim.lr']}" in pods.seen[number]

    assert run_sweep(sweep) == found, "a finished sweep is only reported"
    other = replace(sweep, settings=[*settings, "seed=1"])
    with pytest.raises(ConfigError, match="a run search with other settings exists in MLflow"):
        run_sweep(other)


def test_a_sweep_without_a_finished_trial_fails(kube: FakeKube, uri: str) -> None:
    settings = ["data.shards=s", "model.decoder=d", "evaluation.every=10", f"tracking.uri={uri}", "optim.lr=1e-4,1e-3"]
    Pods(kube, [1.0], failing={0}, endless=set()).start()
    machines = Machines(nodes=1, namespace="mplug")
    with pytest.raises(StageError, match="no trial of tiny-decoder-sweep has finished"):
        run_sweep(Sweep(config="tiny_decoder", settings=settings, trials=1, machines=machines))


def test_an_interrupted_sweep_continues_its_trials(
    uri: str, shards: dict[str, str], tokenizer: str, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards['retrieval']}", f"model.decoder={tokenizer}", "data.batch_size=8"]
    settings += ["training.precision=fp32", "evaluation.every=4", "training.log_every=1", "optim.warmup_steps=0"]
    settings += [f"output={tmp_path}", f"tracking.uri={uri}", "training.steps=60", "optim.lr=1e-3,1e-2"]
    command = [MPLUG, "sweep", "tiny_decoder", *settings, "--trials", "1", "--processes", "1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    server = mlflow.MlflowClient(uri)
    deadline = time.monotonic() + 120
    while not (saved := list(tmp_path.glob("checkpoints/*/*/manifest.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved, first.communicate(timeout=10)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 143, errors
    assert "the next start resumes from it" in errors

    second = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})
    assert second.returncode == 0, second.stderr
    assert "training resumes from step" in second.stderr
    assert str(tmp_path / "models" / "tiny-decoder-sweep-0") in second.stdout
    steps = [step for step, _ in _points(server)]
    assert steps == list(range(4, 64, 4)), "every validation once"
    assert f"{min(value for _, value in _points(server)):.4f}" in second.stdout


def _points(server: mlflow.MlflowClient) -> list[tuple[int, float]]:
    """Steps and values of the validation loss of the first trial."""
    experiments = [each.experiment_id for each in server.search_experiments()]
    trials = [run for run in server.search_runs(experiments) if run.info.run_name == "tiny-decoder-sweep-0"]
    found = [point for run in trials for point in server.get_metric_history(run.info.run_id, METRIC)]
    return sorted((point.step, point.value) for point in found)
