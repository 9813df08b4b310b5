"""Loader processes on local disk and S3, and the batches that they send: jobs of benchmarks/data.py."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data_clips import CONFIG, PROCESSOR, ROUNDS, collate, interleaved, ratio, repeated_corpus, shard, source
from cli.services import BUCKET, object_storage
from model.data.loading.loader import Example, training_batches
from model.data.loading.sampler import BatchSampler

LOADERS, BATCH = 2, 24
SHARED_MEMORY = "/dev/shm"


def loading(folder: Path) -> dict[str, Any]:
    """Reads like the released presets, with loader processes and without a clip cache. As in production, the S3 server
    has a separate core, also when shards are read from disk. The last entry shows the cost of sharing cores."""
    raw = repeated_corpus(folder)
    found = {}
    with object_storage(folder / "s3"):
        for kind, steps, is_apart in (("frames", 50, True), ("original", 16, True), ("frames", 50, False)):
            splits = {"local": shard(raw, str(folder / "out"), kind), "s3": shard(raw, f"s3://{BUCKET}/out", kind)}
            taken: dict[str, list[float]] = {name: [] for name in splits}
            with server_apart() if is_apart else nullcontext():
                for _ in range(ROUNDS + 1):
                    for name, split in splits.items():
                        taken[name].append(read_by_processes(split, steps))
            taken = {name: seconds[1:] for name, seconds in taken.items()}  # the first round is a warm-up
            found[kind if is_apart else f"{kind}, server on the same cores"] = {
                "batches_per_s": {name: round(1 / statistics.median(each), 2) for name, each in taken.items()},
                "s3_over_local": ratio(taken["s3"], taken["local"]),
                "each round": [round(a / b, 3) for a, b in zip(taken["local"], taken["s3"], strict=True)],
            }
    return {"loader processes": LOADERS, "clips per batch": BATCH, **found}


@contextmanager
def server_apart() -> Iterator[None]:
    """Pins the S3 server to the last core, and this process and the fork server of the loader to the other cores."""
    cores = sorted(os.sched_getaffinity(0))
    members = [psutil.Process(), *psutil.Process().children()]
    for member in members:
        pin(member, cores[-1:] if member.name().startswith("weed") else cores[:-1])
    yield
    for member in members:
        pin(member, cores)


def pin(member: psutil.Process, cores: list[int]) -> None:
    for thread in member.threads():
        os.sched_setaffinity(thread.id, cores)


def read_by_processes(split: str, steps: int) -> float:
    """Seconds per batch, after the processes have started."""
    order = BatchSampler(size=600, seed=1, batch_size=BATCH, steps=steps)
    config = CONFIG.model_copy(update={"workers": LOADERS})
    batches = iter(training_batches(source(split), order, collate, config))
    for _ in range(2 * LOADERS):  # they are ready when the first batch has arrived
        next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - start) / count


def normalized(examples: list[Example]) -> dict[str, Any]:
    """Normalises in the loader process, as before batches were uint8."""
    return {"pixel_values": PROCESSOR.normalize(collate(examples)["frames"])}


def batches(folder: Path) -> dict[str, Any]:
    """Both variants end with a normalised batch in the training process, which shares two cores with the loaders."""
    split = shard(repeated_corpus(folder), str(folder / "out"), "frames")
    used: dict[str, int] = {}
    size: dict[str, int] = {}

    def read(name: str) -> None:
        order = BatchSampler(size=600, seed=1, batch_size=BATCH, steps=25)
        config = CONFIG.model_copy(update={"workers": LOADERS})
        before = shutil.disk_usage(SHARED_MEMORY).used
        for batch in training_batches(source(split), order, COLLATE[name], config):
            used[name] = max(used.get(name, 0), shutil.disk_usage(SHARED_MEMORY).used - before)
            (tensor,) = batch.values()
            size[name] = tensor.nbytes
            if "frames" in batch:
                PROCESSOR.normalize(tensor)

    taken = interleaved({name: lambda _, name=name: read(name) for name in COLLATE}, time.perf_counter)
    return {
        "batches_per_s": {name: round(25 / statistics.median(seconds), 2) for name, seconds in taken.items()},
        "uint8_over_float32": ratio(taken["uint8"], taken["float32"]),
        "bytes_per_batch": size,
        "shared_memory_bytes": used,
    }


COLLATE: dict[str, Callable[[list[Example]], dict[str, Any]]] = {"uint8": collate, "float32": normalized}
