"""The training loop: `torchrun --nproc-per-node 2 -m model.training tiny_pretraining data.shards=s3://…`.

One loop for every task, on one process and on many. `train` is the outline; the mechanics are one call away.
"""

import math
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from model import manifest, storage
from model.config import ConfigError, RunConfig, TrackingConfig, in_steps
from model.data.loader import Batches, ClipSource, open_split, training_batches
from model.data.sampler import BatchSampler
from model.data.shards import ShardReader
from model.exits import StageError
from model.progress import progress
from model.tasks import Task, build_task
from model.tracking import Run, flat, tracked
from model.training.distributed import Processes, mean_over_processes, processes
from model.training.engine import Engine
from model.training.optim import lr_at

HISTORY = "history.jsonl"
"""The metrics of the run that made a model travel with it."""


def train(config: RunConfig) -> None:
    """Trains one run and publishes its model; prints the model's URI."""
    with processes() as group:
        _refuse_uneven(config, group.world_size)
        torch.manual_seed(config.seed)  # the same fresh weights on every process
        reader = open_split(storage.join(config.data.shards, "train"), config.data)
        config = in_steps(config, len(reader))
        task = build_task(config)
        task.model.train()
        engine = Engine(task.network, config, group)
        batches = _batches(task, reader, config, group)
        # one process speaks to MLflow; the others keep a journal of their own
        tracking = config.tracking if group.is_main else TrackingConfig()
        with tracked(tracking, config.name) as run:
            run.params(flat(config.model_dump()))
            _run_steps(engine, batches, config, run, show=group.is_main)
            if group.is_main:
                print(_publish(task, config, run))
        dist.barrier()


def _run_steps(engine: Engine, batches: Batches, config: RunConfig, run: Run, *, show: bool) -> None:
    meter, upcoming = Meter(config.data.batch_size), iter(batches)
    total = config.training.steps
    bar = progress(range(total), total=total, desc=config.name, unit="step", show=show)
    for step in bar:
        micro_batches = list(islice(upcoming, config.training.gradient_accumulation))
        meter.data_ready()
        lr = lr_at(step, total, config.optim)
        result = engine.step(micro_batches, lr)
        meter.step_done()

        is_log_step = (step + 1) % config.training.log_every == 0 or step + 1 == total
        if is_log_step:
            losses = mean_over_processes(result.losses)
            _refuse_divergence(losses["loss"], step)
            metrics = {f"train/{name}": value for name, value in losses.items()}
            metrics |= {"train/lr": lr, "train/grad_norm": result.grad_norm, "data/read_failures": batches.failed}
            run.metrics({**metrics, **meter.flush()}, step + 1)
            bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)


class Meter:
    """Speed over one logging interval."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps = 0
        self.data_wait_s = 0.0
        self.interval_start = self.step_start = time.perf_counter()

    def data_ready(self) -> None:
        self.data_wait_s += time.perf_counter() - self.step_start

    def step_done(self) -> None:
        self.steps += 1
        self.step_start = time.perf_counter()

    def flush(self) -> dict[str, float]:
        elapsed_s = time.perf_counter() - self.interval_start
        metrics = {
            "perf/clips_per_s": self.steps * self.batch_size / elapsed_s,
            "perf/data_wait_share": self.data_wait_s / elapsed_s,
        }
        self.steps, self.data_wait_s, self.interval_start = 0, 0.0, time.perf_counter()
        return metrics


def _batches(task: Task, reader: ShardReader, config: RunConfig, group: Processes) -> Batches:
    source = ClipSource(
        reader=reader, processor=task.processor, augment=config.data, seed=config.seed, read_video=task.reads_video
    )
    accumulation = config.training.gradient_accumulation
    order = BatchSampler(
        size=len(reader),
        seed=config.seed,
        batch_size=config.data.batch_size // accumulation,
        steps=config.training.steps * accumulation,
        rank=group.rank,
        world_size=group.world_size,
    )
    return training_batches(source, order, task.collate, config.data)


def _publish(task: Task, config: RunConfig, run: Run) -> str:
    """Writes the model as transformers loads it, its configuration and its history; returns its URI."""
    with tempfile.TemporaryDirectory() as folder:
        task.model.save_pretrained(folder)
        if task.reads_video:
            task.processor.save_pretrained(folder)
        else:
            task.processor.tokenizer.save_pretrained(folder)
        shutil.copy(run.journal, Path(folder) / HISTORY)
        base = storage.join(config.output, "models", config.name)
        uri = manifest.publish(Path(folder), base, config=config.model_dump(mode="json"), run_id=run.run_id)
    run.tags({"model_uri": uri, "manifest_sha256": manifest.sha256_of(uri)})
    return uri


def _refuse_uneven(config: RunConfig, world_size: int) -> None:
    share = world_size * config.training.gradient_accumulation
    if config.data.batch_size % share:
        raise ConfigError(
            f"data.batch_size must be a multiple of processes x training.gradient_accumulation = {share}, "
            f"got {config.data.batch_size}."
        )


def _refuse_divergence(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise StageError(f"loss is {loss} at step {step + 1}. Lower optim.lr or warm up longer.")
