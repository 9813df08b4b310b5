"""The training loop: `torchrun --nproc-per-node 2 -m model.training tiny_pretraining data.shards=s3://…`.

One loop for all tasks, for any number of processes, for new and resumed runs. `run_training` sets up, `Training.run` is
the outline.
"""

import hashlib
import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from transformers.utils import logging as transformers_logging

from model import storage
from model.config.schema import RunConfig, TrackingConfig, count_in_steps, micro_batch_size
from model.data.loading.loader import Batch, Batches, ClipSource, open_split, start_fork_server, training_batches
from model.data.loading.sampler import BatchSampler
from model.data.shards.reader import ShardReader, read_dataset_info
from model.distributed import Processes, mean_over_processes, processes
from model.errors import TERMINATED, StageError
from model.progress import progress
from model.tasks.base import Task
from model.tasks.build import build_task
from model.tracking import Run, flatten, tracked
from model.training import attempts
from model.training.attempts import Attempt, run_folder
from model.training.checkpoint import HISTORY, Checkpoints, frozen_sha256
from model.training.clock import Clock
from model.training.engine import Engine, StepResult
from model.training.exporter import Exporter
from model.training.flops import step_flops
from model.training.meter import Meter
from model.training.optim import lr_at
from model.training.profiling import profiled
from model.training.publishing import link_model, publish_model
from model.training.state import Progress
from model.training.validation import Validation
from model.training.watchdog import Watchdog

log = logging.getLogger("mplug")


def run_training(config: RunConfig) -> None:
    """Trains or resumes one run, publishes its model and prints the URI of the model."""
    if config.data.workers:
        start_fork_server(f"model.tasks.{config.task}")
    watchdog, exporter = Watchdog(config.watchdog), Exporter(config.name)
    with processes(config.watchdog) as group, watchdog.together(group):
        reader = open_split(storage.join(config.data.shards, "train"), config.data)
        config = count_in_steps(config, len(reader))
        micro_batch_size(config, group.world_size)  # raises ConfigError early
        folder = run_folder(config)
        attempt = group.from_main(lambda: attempts.read_attempt(folder))
        if attempt.model:
            is_synced = attempt.is_synced or group.from_main(lambda: _sync_tracking(config, attempt))
            attempt = replace(attempt, is_synced=is_synced)
        else:
            attempt = _train(config, reader, folder, attempt, group, watchdog, exporter)
        if group.is_main:
            attempts.finish_attempt(folder, attempt)
            print(attempt.model)


def _train(
    config: RunConfig,
    reader: ShardReader,
    folder: str,
    attempt: Attempt,
    group: Processes,
    watchdog: Watchdog,
    exporter: Exporter,
) -> Attempt:
    torch.manual_seed(config.seed)  # for the same fresh weights on every process
    transformers_logging.disable_progress_bar()  # every process would show one
    task = build_task(config)
    task.model.train()
    base_sha256 = group.from_main(lambda: frozen_sha256(task.network))
    engine = Engine(task.network, config, group)
    checkpoints = Checkpoints(folder, config.checkpoint, engine, base_sha256, group)
    restored = checkpoints.restore()
    state = Progress.load(restored["progress"]) if restored else Progress()
    history = checkpoints.history() if restored and group.is_main else []
    if attempt.number > 1 and group.is_main:
        log.info("training resumes from step %d", state.step)
    # the first process talks to MLflow; all other processes only write a journal
    tracking = config.tracking if group.is_main else TrackingConfig()
    described = f"{config.task} on {config.data.shards}, from {config.model.init_from or 'fresh weights'}"
    with tracked(tracking, config.name, attempt.key, history, described) as run, termination() as asked:
        watchdog.on_exit = lambda: run.finish("FAILED")
        run.params(flatten(config.model_dump()))
        data = read_dataset_info(config.data.shards)
        run.dataset(f"{data['dataset']}-train", data["sha256"]["train"], config.data.shards, "training")
        run.tags({"attempt": str(attempt.number), "base_sha256": base_sha256, "data": config.data.shards})
        training = Training(config, task, engine, reader, checkpoints, run, group, watchdog, exporter, asked, state)
        training.run()
        training.take_best()
        with engine.whole_weights():
            model = publish_model(task, config, run, base_sha256) if group.is_main else ""
    return group.from_main(lambda: replace(attempt, model=model, is_synced=run.is_synced))


def _sync_tracking(config: RunConfig, attempt: Attempt) -> bool:
    """Sends the missing entries of a finished run to MLflow. Returns whether it has received everything."""
    history = map(json.loads, storage.read(storage.join(attempt.model, HISTORY)).splitlines())
    with tracked(config.tracking, config.name, attempt.key, history) as run:
        run.params(flatten(config.model_dump()))
        link_model(run, config, attempt.model)
    return run.is_synced


@dataclass
class Training:
    """The state of a running training."""

    config: RunConfig
    task: Task
    engine: Engine
    reader: ShardReader
    checkpoints: Checkpoints
    tracking: Run
    group: Processes
    watchdog: Watchdog
    exporter: Exporter
    asked_to_end: threading.Event
    progress: Progress

    def __post_init__(self) -> None:
        self.clock = Clock(self.group.device)
        self.total = self.config.training.steps
        self.validation = Validation(self.task, self.config, self.group) if self.config.evaluation.every else None
        self.last_losses: dict[str, float] = {}

    def run(self) -> None:
        """Runs all remaining steps."""
        batches = self._batches()
        dtype = torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32
        upcoming, meter = iter(batches), Meter(self.clock, self.group, dtype)
        bar = progress(
            range(self.progress.step, self.total),
            total=self.total,
            initial=self.progress.step,
            desc=self.config.name,
            unit="step",
            show=self.group.is_main,
        )
        self.watchdog.enter("first_step")
        with profiled(self.config, self.group) as step_is_done:
            for step in bar:
                micro_batches = self._read(upcoming)
                result = self._step(step, micro_batches)
                meter.count(micro_batches, self.config.data.batch_size)
                self.progress.step = done = step + 1
                self._count_skip(result)
                is_last = done == self.total
                is_log_step = done % self.config.training.log_every == 0 or is_last
                is_evaluation_step = self.validation and (done % self.config.evaluation.every == 0 or is_last)
                every = self.config.checkpoint.every
                is_checkpoint_step = is_evaluation_step or (every and done % every == 0) or is_last

                if is_log_step:
                    clips_per_s = self._log(result, batches, meter, micro_batches)
                    loss = f"{self.last_losses['loss']:.3f}"
                    bar.set_postfix({"loss": loss, "clips/s": f"{clips_per_s:.1f}"}, refresh=False)
                if is_evaluation_step:
                    self._evaluate()
                if is_checkpoint_step:
                    self._save()
                if self.group.any(self.asked_to_end.is_set()):
                    self._end_early(is_saved=bool(is_checkpoint_step))
                step_is_done()
                self.watchdog.enter("step")
        self._wait_for_upload()

    def _read(self, upcoming: Iterator[Batch]) -> list[Batch]:
        with self.clock.section("data", computes=False):
            return list(islice(upcoming, self.config.training.gradient_accumulation))

    def _step(self, step: int, micro_batches: list[Batch]) -> StepResult:
        seed_step(self.config.seed, step, self.group.rank)
        return self.engine.step(micro_batches, lr_at(step, self.total, self.config.optim), self.clock)

    def _count_skip(self, result: StepResult) -> None:
        """Counts steps whose gradients are not finite. After several in a row, restores the last checkpoint."""
        limits, state = self.config.training, self.progress
        state.consecutive_skips = 0 if result.applied else state.consecutive_skips + 1
        if result.applied:
            return
        state.skips += 1
        log.warning("step %d is skipped: its gradients are not finite (%d so far)", state.step, state.skips)
        if state.skips > limits.max_skips:
            raise StageError(
                f"at most training.max_skips = {limits.max_skips} steps may have gradients that are not finite, got "
                f"{state.skips}. Lower optim.lr or warm up longer."
            )
        if state.consecutive_skips == limits.consecutive_skips:
            self._roll_back()

    def _roll_back(self) -> None:
        """Restores the weights of the last checkpoint. The clips since then are not repeated."""
        self._wait_for_upload()
        restored = self.checkpoints.restore()
        if restored is None:
            log.warning("there is no checkpoint to restore yet; training continues with the current weights")
        elif self.group.is_main:
            log.warning("weights were restored from step %d", restored["step"])

    def _log(self, result: StepResult, batches: Batches, meter: Meter, micro_batches: list[Batch]) -> float:
        """Logs metrics. Returns the clips per second since the last call."""
        losses = self.last_losses = mean_over_processes(result.losses)
        state = self.progress
        state.read_failures += sum(self.group.gathered(batches.take_failures()))
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {"train/lr": lr_at(state.step - 1, self.total, self.config.optim)}
        metrics |= {"train/grad_norm": result.grad_norm, "train/skipped_steps": float(state.skips)}
        metrics |= {"data/read_failures": float(state.read_failures)}
        flops = sum(self._flops(batch) for batch in micro_batches)
        metrics |= meter.flush(self.total - state.step, flops)
        self.tracking.metrics(metrics, state.step)
        self.exporter.show(metrics, state.step)
        return metrics["perf/clips_per_s"]

    def _flops(self, batch: Batch) -> float:
        return step_flops(self.task, self.task.vision_passes(batch), self.task.decoder_passes(batch)).total

    def _evaluate(self) -> None:
        assert self.validation
        self.watchdog.enter("evaluation")
        with self.clock.section("evaluation", computes=False):
            scores = self.validation.run(self.engine)
        self.tracking.metrics(scores, self.progress.step)
        self.exporter.show(scores, self.progress.step)
        self.progress.note(self.validation.chosen(scores), lower_is_better=self.validation.lower_is_better)

    def _save(self) -> None:
        self._wait_for_upload()
        with self.clock.section("checkpoint", computes=False):
            facts = {"progress": asdict(self.progress), "config": self.config.model_dump(mode="json")}
            self.checkpoints.save(self.progress.step, self.tracking.history(), facts, self.progress.best_step)

    def _wait_for_upload(self) -> bool:
        """Waits for the last checkpoint and returns whether it is complete."""
        self.watchdog.enter("checkpoint")
        with self.clock.section("checkpoint", computes=False):
            self.checkpoints.wait()
            pending = self.group.from_main(lambda: self.checkpoints.pending_step)
        if pending >= 0 and pending == self.progress.best_step:
            self.progress.forget_best()
        return pending < 0

    def _end_early(self, *, is_saved: bool) -> None:
        """Saves and exits. All processes end at the same step, no matter which one was asked to end."""
        if not is_saved:
            self._save()
        is_saved = self._wait_for_upload()
        if self.group.is_main:
            then = "the next start resumes from it" if is_saved else "the next start resumes from the previous one"
            log.warning("asked to end: step %d is %s, %s", self.progress.step, "saved" if is_saved else "lost", then)
        raise SystemExit(TERMINATED)

    def take_best(self) -> None:
        """Restores the best checkpoint, if the run is evaluated."""
        best = self.progress.best_step
        if self.validation and 0 <= best < self.total:
            self.checkpoints.restore_step(best)
        if self.validation:
            self.tracking.tags({"best_step": str(best), "best_value": str(self.progress.best_value)})

    def _batches(self) -> Batches:
        config, accumulation = self.config, self.config.training.gradient_accumulation
        source = ClipSource(
            reader=self.reader,
            processor=self.task.processor,
            augment=config.data,
            seed=config.seed,
            read_video=self.task.reads_video,
        )
        order = BatchSampler(
            size=len(self.reader),
            seed=config.seed,
            batch_size=config.data.batch_size // accumulation,
            steps=self.total * accumulation,
            rank=self.group.rank,
            world_size=self.group.world_size,
            start_step=self.progress.step * accumulation,
        )
        return training_batches(source, order, self.task.collate, config.data)


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that is set on SIGTERM."""
    asked = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch on all devices, so that dropout does not depend on restarts."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
