"""Searches the settings of a training: Optuna chooses them, MLflow keeps the trials.

The sweep is a run in MLflow, and each trial is a child run that the training of this trial writes to. A trial whose
validation metric is worse than the median of the earlier ones at the same step is stopped. The same sweep that is
started again continues: trials that were interrupted resume from their checkpoints.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.context import SpawnProcess
from typing import Any

import optuna
import yaml
from mlflow.exceptions import MlflowException
from mlflow.optuna.storage import MlflowStorage
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from components.jobs.launcher import train_on_cluster
from model.config.load import YamlLoader, load_config
from model.config.schema import RunConfig
from model.errors import (
    CONFIGURATION,
    DATA,
    TERMINATED,
    ConfigError,
    ProcessFailedError,
    StageError,
    TrackingError,
    exit_codes,
)
from model.parent import signal_when_parent_ends
from model.tasks.metrics import lower_is_better
from model.tracking import experiment_id, mlflow_client
from model.training.launch import launch

log = logging.getLogger("mplug")
NUMBER = r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(:log)?")
SETTINGS = "settings"
"""Attribute of a study: the preset, the fixed settings and what is searched."""
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}
STARTUP_TRIALS = 4
"""Finished trials before the first one can be stopped early."""
POLL_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where trials train: in processes of this machine, or as jobs of `nodes` pods on a cluster."""

    parallel: int = 1
    """Trials at the same time."""
    processes: int | None = None
    """Per machine. None or 0: one per GPU, or one."""
    nodes: int = 0
    image: str = ""
    namespace: str = ""
    deadline_hours: float = 0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is searched, and how long."""

    config: str
    settings: Sequence[str]
    """As dotted.key=value, fixed or searched; see `split_settings`."""
    name: str = ""
    """Empty: the name of the run and "-sweep"."""
    trials: int
    """In all, with those of earlier starts."""
    prunes: bool = True
    machines: Machines = field(default_factory=Machines)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A finished trial."""

    number: int
    value: float
    """The best value of `evaluation.metric`."""
    params: Mapping[str, Any]
    """The searched settings."""
    model: str
    """URI of its model."""


def split_settings(settings: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Fixed settings, and what to search: key=1e-5..1e-3:log is a range, key=8,16,32 a choice."""
    fixed, space = list[str](), dict[str, BaseDistribution]()
    for setting in settings:
        key, _, text = setting.partition("=")
        if found := _distribution(key, text):
            space[key] = found
        else:
            fixed.append(setting)
    return fixed, space


def _distribution(key: str, text: str) -> BaseDistribution | None:
    if match := RANGE.fullmatch(text):
        low, high = (_scalar(key, end) for end in match.groups()[:2])
        is_log, kind = (
            bool(match[3]),
            IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution,
        )
        if not low < high or (is_log and low <= 0):
            raise ConfigError(f"{key} must be searched from a lower to a higher value, above 0 with :log, got {text}.")
        return kind(low, high, log=is_log)
    if "," in text and not text.startswith(("[", "{", "'", '"')):
        return CategoricalDistribution([_scalar(key, choice) for choice in text.split(",")])
    return None


def _scalar(key: str, text: str) -> Any:
    """A value as YAML reads it, so that MLflow gets the same text from Optuna and from the training."""
    try:
        value = yaml.load(text, YamlLoader)
    except yaml.YAMLError:
        value = []
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"{key} must be searched among numbers, words or true and false, got {text!r}.")
    return value


def run_sweep(sweep: Sweep) -> list[Ranked]:
    """Runs the trials that are missing, and returns all that have finished, the best first.

    Raises StageError if none has.
    """
    fixed, space = split_settings(sweep.settings)
    config = _validated(sweep, fixed, space)
    try:
        return _Driver(sweep, config, fixed, space).run()
    except MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise TrackingError(f"MLflow: {reason} The same command continues the sweep.") from error


def _validated(sweep: Sweep, fixed: Sequence[str], space: Mapping[str, BaseDistribution]) -> RunConfig:
    """The configuration of a trial; every end of every range is checked before the first one."""
    named = [f"name={sweep.name}"] if sweep.name else []
    if not space:
        raise ConfigError("a sweep needs a setting to search, such as optim.lr=1e-5..1e-3:log or data.batch_size=8,16.")
    first = {key: _ends(found)[0] for key, found in space.items()}
    for key, found in space.items():
        for end in _ends(found):
            config = load_config(sweep.config, [*fixed, *named, *_settings({**first, key: end})])
    if not config.tracking.uri:
        raise ConfigError("tracking.uri must name the MLflow server, which keeps the trials of a sweep.")
    if not config.evaluation.every:
        raise ConfigError("evaluation.every must be set: trials are compared by evaluation.metric during the training.")
    return config


def _ends(found: BaseDistribution) -> Sequence[Any]:
    if isinstance(found, CategoricalDistribution):
        return found.choices
    assert isinstance(found, IntDistribution | FloatDistribution)
    return found.low, found.high


def _settings(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in params.items()]


class _Driver:
    """The trials of a sweep in this process."""

    def __init__(
        self, sweep: Sweep, config: RunConfig, fixed: Sequence[str], space: Mapping[str, BaseDistribution]
    ) -> None:
        self.fixed, self.space = fixed, space
        self.sweep, self.machines, self.name = sweep, sweep.machines, sweep.name or f"{config.name}-sweep"
        metric = config.evaluation.metric or "loss"
        self.metric, self.is_low_better = f"{config.evaluation.split}/{metric}", lower_is_better(metric)
        self.server = mlflow_client(config.tracking.uri)
        self.experiment = experiment_id(self.server, config.tracking.experiment)
        self.study = self._open_study(config.seed)
        self.running: dict[Trial, SpawnProcess] = {}
        self.pruned: set[Trial] = set()
        self.reported: dict[Trial, int] = {}
        """Newest step of each trial that Optuna knows."""

    def run(self) -> list[Ranked]:
        upcoming = self._upcoming()
        try:
            with _termination():
                while True:
                    for trial in islice(upcoming, self.machines.parallel - len(self.running)):
                        self._start(trial)
                    if not self.running:
                        break
                    time.sleep(POLL_S)
                    for trial in list(self.running):
                        self._check(trial)
        finally:
            for process in self.running.values():
                process.terminate()  # its training saves a checkpoint
            for process in self.running.values():
                process.join()
        return self._finish()

    def _upcoming(self) -> Iterator[Trial]:
        """The trials that an earlier start has not ended, then new ones.

        An earlier one whose settings were not complete has failed.
        """
        earlier = self.study.get_trials()
        for each in earlier:
            if each.state != TrialState.RUNNING:
                continue
            trial = Trial(self.study, each._trial_id)
            self.reported[trial] = -1 if each.last_step is None else each.last_step
            if each.params.keys() == self.space.keys():
                yield trial
            else:
                self.study.tell(trial, state=TrialState.FAIL)
        for _ in range(self.sweep.trials - len(earlier)):
            yield self.study.ask(dict(self.space))

    def _start(self, trial: Trial) -> None:
        settings = [*self.fixed, *_settings(trial.params)]
        settings += [f"name={self.name}-{trial.number}", f"tracking.run={trial._trial_id}"]
        process = multiprocessing.get_context("spawn").Process(
            target=_train, args=(self.sweep.config, settings, self.machines)
        )
        process.start()
        self.running[trial] = process
        log.info("trial %d: %s", trial.number, " ".join(_settings(trial.params)))

    def _check(self, trial: Trial) -> None:
        """Tells Optuna what a trial has reached, and stops it if it is not promising."""
        process = self.running[trial]
        ended = not process.is_alive()  # before the points are read: there will be no more
        points = sorted(self.server.get_metric_history(trial._trial_id, self.metric), key=lambda point: point.step)
        fresh = [point for point in points if point.step > self.reported.get(trial, -1)]
        for point in fresh:
            trial.report(point.value, point.step)
            self.reported[trial] = point.step
        if ended:
            del self.running[trial]
            self._end(trial, process.exitcode or 0, [point.value for point in points])
        elif fresh and self.sweep.prunes and trial not in self.pruned and trial.should_prune():
            self.pruned.add(trial)
            process.terminate()

    def _end(self, trial: Trial, code: int, values: Sequence[float]) -> None:
        if trial in self.pruned and code in (TERMINATED, -signal.SIGTERM):
            state, value = TrialState.PRUNED, None
        elif code or not values:
            state, value = TrialState.FAIL, None
        else:  # the best checkpoint is the model
            state, value = TrialState.COMPLETE, (min if self.is_low_better else max)(values)
        self.study.tell(trial, value, state)
        reached = "" if value is None else f", {self.metric} {value:.4f}"
        log.info("trial %d: %s%s", trial.number, STATES[state], reached)
        if state == TrialState.FAIL and code in (CONFIGURATION, DATA):
            raise ProcessFailedError(f"trial {trial.number} failed, and so would all others; see above.", code)

    def _finish(self) -> list[Ranked]:
        sign = 1 if self.is_low_better else -1
        finished = [each for each in self.study.get_trials() if each.state == TrialState.COMPLETE]
        if not finished:
            raise StageError(f"no trial of {self.name} has finished; see the log.")
        finished.sort(key=lambda each: sign * (each.value or 0))
        best = finished[0]
        self.server.log_metric(self.study._study_id, self.metric, best.value)
        self.server.set_tag(self.study._study_id, "best_trial", str(best.number))
        self.server.set_terminated(self.study._study_id)
        tags = [self.server.get_run(each._trial_id).data.tags for each in finished]
        return [
            Ranked(number=each.number, value=each.value or 0, params=each.params, model=own.get("model_uri", ""))
            for each, own in zip(finished, tags, strict=True)
        ]

    def _open_study(self, seed: int) -> optuna.Study:
        """The study of this name in MLflow. Raises ConfigError if it searches something else."""
        space = {key: optuna.distributions.distribution_to_json(found) for key, found in self.space.items()}
        settings = json.dumps([self.sweep.config, list(self.fixed), space])
        known = self.server.search_runs([self.experiment], f"tags.`mlflow.runName` = '{self.name}'", max_results=1)
        if known and known[0].data.tags.get(f"user_{SETTINGS}") != json.dumps(settings):
            raise ConfigError(f"a run {self.name} with other settings exists in MLflow. Choose another --name.")
        storage, direction = MlflowStorage(self.experiment), "minimize" if self.is_low_better else "maximize"
        if not known:
            optuna.create_study(storage=storage, study_name=self.name, direction=direction)
        # a continued sweep must not draw the values of its first trials again
        seed += storage.get_n_trials(known[0].info.run_id) if known else 0
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.machines.parallel > 1)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
        study = optuna.load_study(storage=storage, study_name=self.name, sampler=sampler, pruner=pruner)
        study.set_user_attr(SETTINGS, settings)
        self.server.update_run(study._study_id, "RUNNING")
        return study


def _train(config: str, settings: list[str], machines: Machines) -> None:
    """Trains one trial in this separate process, which saves a checkpoint and ends on SIGTERM."""
    signal_when_parent_ends(signal.SIGTERM)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the URI of its model is not the result of the sweep
    with exit_codes():
        if machines.nodes:
            cluster = (machines.image, machines.namespace, machines.deadline_hours)
            train_on_cluster(config, settings, machines.nodes, machines.processes or 0, *cluster)
            return
        if machines.parallel > 1:
            cores = len(os.sched_getaffinity(0)) // (machines.parallel * (machines.processes or 1))
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        sys.exit(launch(config, settings, machines.processes))


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM ends this process like Ctrl-C, so that it ends its trials."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
