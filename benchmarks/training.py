"""Compares training with alternatives, interleaved in one run.

    python -m benchmarks.training overhead    the training loop and a bare DeepSpeed loop on the same batches
    python -m benchmarks.training waiting     share of time in which steps wait for data
    python -m benchmarks.training saving      wait of a step for a checkpoint, and a blocking save to the same S3
    python -m benchmarks.training scaling     clips/s of two processes and of one
    python -m benchmarks.training step        a step with and without compilation and recomputation, and a plain loop
    python -m benchmarks.training kills       30 random faults: final weights, metric series, lost work, recovery time
    python -m benchmarks.training             all six

Needs `pip install -e '.[demo]'`. Writes benchmarks/results/training.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_kills import KILLS, kills
from benchmarks.training_step import steps
from cli.services import BUCKET, object_storage
from model.config.load import load_config
from model.config.schema import RunConfig, TrackingConfig, WatchdogConfig
from model.data.annotations import COLUMNS
from model.data.loading.loader import open_split
from model.data.shards.build import ShardSettings
from model.data.shards.commit import build_shards
from model.data.shards.format import Form
from model.data.synthetic.corpus import synthesize_corpus
from model.distributed import ALONE, Processes, processes
from model.tasks.build import build_task
from model.tasks.language_modeling import publish_tokenizer
from model.tracking import tracked
from model.training.checkpoint import Checkpoints
from model.training.engine import Engine
from model.training.exporter import Exporter
from model.training.loop import Training, seed_step
from model.training.state import Progress
from model.training.watchdog import Watchdog

RESULTS = Path(__file__).parent / "results" / "training.json"
MPLUG = str(Path(sys.executable).with_name("mplug"))
ROUNDS, STEPS = 8, 20


def corpus(folder: Path) -> list[str]:
    """Overrides with the shards and the decoder of a small synthetic corpus."""
    source = synthesize_corpus(folder / "source", seed=1, scale=0.1)
    form = Form(num_frames=8, short_side=72)
    shards = build_shards(ShardSettings(raw=str(source), root=str(folder), dataset=next(iter(COLUMNS)), form=form))
    tokenizer = publish_tokenizer(str(source), str(folder), vocab_size=448)
    train = [MPLUG, "train", "tiny_decoder", f"data.shards={shards}", f"model.decoder={tokenizer}", f"output={folder}"]
    result = subprocess.run([*train, "training.steps=50"], check=True, capture_output=True, text=True)
    return [f"data.shards={shards}", f"model.decoder={result.stdout.strip()}", f"output={folder}", "data.workers=0"]


@contextmanager
def alone() -> Iterator[Processes]:
    os.environ |= {**ALONE, "DS_ACCELERATOR": "cpu"}
    with processes(WatchdogConfig()) as group:
        yield group


def overhead(folder: Path) -> dict[str, Any]:
    """Both loops use the same batches from memory and the same engine, interleaved."""
    config = load_config(
        "tiny_pretraining", [*corpus(folder), "data.batch_size=32", f"training.steps={STEPS}", "optim.warmup_steps=0"]
    )
    with alone() as group, tracked(TrackingConfig(), "overhead") as run:
        torch.set_num_threads(1)
        task = build_task(config)
        task.model.train()
        engine = Engine(task.network, config, group)
        reader = open_split(f"{config.data.shards}/train", config.data)
        checkpoints = Checkpoints(str(folder / "run"), config.checkpoint, engine, "", group)
        config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 0})})
        training = Training(
            config,
            task,
            engine,
            reader,
            checkpoints,
            run,
            group,
            Watchdog(config.watchdog),
            Exporter(config.name),
            threading.Event(),
            Progress(),
        )
        batches = list(islice(iter(training._batches()), 8))
        stored = _Stored(batches)
        training._batches = lambda: stored  # type: ignore[method-assign]
        taken: dict[str, list[float]] = {"ours": [], "bare DeepSpeed": []}
        for turn in range(ROUNDS + 1):
            for name in taken:
                start = time.perf_counter()
                if name == "ours":
                    training.progress.step = 0
                    _steps_of(training)
                else:
                    _bare(engine, batches)
                if turn:
                    taken[name].append((time.perf_counter() - start) / STEPS)
        ratios = [a / b for a, b in zip(taken["ours"], taken["bare DeepSpeed"], strict=True)]
    medians = {f"{name}, ms per step": round(1000 * statistics.median(times), 2) for name, times in taken.items()}
    return {
        **medians,
        "overhead": round(statistics.median(ratios) - 1, 4),
        "each round": [round(x - 1, 4) for x in ratios],
    }


class _Stored:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return cycle(self.batches)

    def take_failures(self) -> int:
        return 0


def _steps_of(training: Training) -> None:
    """The loop without its last checkpoint, which is measured separately."""
    save, training._save = training._save, lambda: None  # type: ignore[method-assign]
    training.run()
    training._save = save  # type: ignore[method-assign]


def _bare(engine: Engine, batches: list[Any]) -> None:
    """Like DeepSpeed's examples, with a loss printed every ten steps."""
    for step, batch in enumerate(islice(cycle(batches), STEPS)):
        seed_step(0, step, 0)
        loss, _ = engine.engine(batch)
        engine.engine.backward(loss)
        engine.engine.step()
        if (step + 1) % 10 == 0:
            float(loss)


def waiting(folder: Path) -> dict[str, Any]:
    settings = [*corpus(folder), "training.steps=60", "optim.warmup_steps=0", "training.log_every=10"]
    return {
        f"{workers} loader processes": _history(settings, f"data.workers={workers}", f"trial={workers + 1}")
        for workers in (0, 1, 2)
    }


def _history(settings: list[str], *overrides: str, count: int = 1) -> dict[str, float]:
    command = [MPLUG, "train", "tiny_pretraining", "--processes", str(count), *settings, *overrides]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    points = [json.loads(line) for line in (Path(result.stdout.strip()) / "history.jsonl").read_text().splitlines()][1:]
    names = ("perf/data_wait_share", "perf/clips_per_s", "perf/mfu")
    return {name: round(statistics.median(point[name] for point in points), 4) for name in names}


def saving(folder: Path) -> dict[str, Any]:
    """68 million trained parameters: half of the paper's vision encoder."""
    wide = ["model.vision.hidden_size=768", "model.vision.num_hidden_layers=6", "model.vision.num_attention_heads=8"]
    config: RunConfig = load_config("tiny_pretraining", [*corpus(folder), *wide, "data.batch_size=2"])
    with object_storage(folder / "s3"), alone() as group:
        engine = Engine(build_task(config).network, config, group)
        checkpoints = Checkpoints(f"s3://{BUCKET}/run", config.checkpoint, engine, "", group)
        checkpoints.save(0, b"", {})
        checkpoints.wait()  # the memory of the copy is allocated once per run
        waits, whole = [], []
        for step in range(1, ROUNDS + 1):
            start = time.perf_counter()
            checkpoints.save(step, b"", {})
            waits.append(time.perf_counter() - start)
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        size = sum(tensor.nbytes for tensor in engine.state.tensors().values())
    ratio = statistics.median(a / b for a, b in zip(waits, whole, strict=True))
    return {
        "bytes": size,
        "in the step, s": round(statistics.median(waits), 3),
        "blocking, s": round(statistics.median(whole), 3),
        "share": round(ratio, 4),
    }


def scaling(folder: Path) -> dict[str, Any]:
    """The same global batch on one process and on two, interleaved."""
    settings = [*corpus(folder), "training.steps=60", "optim.warmup_steps=0", "training.log_every=10"]
    found: dict[str, list[float]] = {"1 process": [], "2 processes": []}
    for turn in range(ROUNDS // 2):
        for count, name in enumerate(found, start=1):
            found[name].append(
                _history(settings, f"trial={turn + 1}", f"name=w{count}", count=count)["perf/clips_per_s"]
            )
    ratio = statistics.median(b / a for a, b in zip(*found.values(), strict=True))
    return {**{f"{name}, clips/s": rates for name, rates in found.items()}, "ratio": round(ratio, 3)}


JOBS = {"overhead": overhead, "waiting": waiting, "saving": saving, "scaling": scaling, "step": steps}


def main(names: list[str], count: int) -> None:
    if len(names) > 1:  # DeepSpeed keeps the first process group of a process
        for name in names:
            subprocess.run([sys.executable, "-m", "benchmarks.training", name, "--kills", str(count)], check=True)
        return
    (name,) = names
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    results["machine"] = f"{cpu.partition(': ')[2]}, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results[name] = kills(folder, corpus(folder), count) if name == "kills" else JOBS[name](folder)
    print(json.dumps({name: results[name]}, indent=1, ensure_ascii=False), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, "kills", []], help="default: all")
    parser.add_argument("--kills", type=int, default=KILLS, help="how many")
    options = parser.parse_args()
    main(options.jobs or [*JOBS, "kills"], options.kills)
