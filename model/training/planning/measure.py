"""Measures memory and time of a few real steps on this machine, with arbitrary weights and without data.

`python -m model.training.planning.measure CONFIG [key=value …]` prints a JSON object. `mplug plan --measure` runs it.
"""

import json
import os
import resource
import sys
import time
from dataclasses import asdict

import torch

from model import storage
from model.config.load import load_config
from model.config.schema import RunConfig
from model.data.loading.loader import ClipSource, open_split
from model.distributed import ALONE, processes
from model.errors import DataError, StorageError
from model.tasks.base import Task
from model.tasks.build import build_meta_task
from model.training.clock import Clock
from model.training.engine import Engine
from model.training.optim import lr_at
from model.training.planning.estimate import Measurement

STEPS, CLIPS = 4, 24


def measure_steps(config: RunConfig) -> Measurement:
    """Runs steps over `data.batch_size` clips on one process."""
    os.environ |= ALONE
    with processes(config.watchdog) as group:
        task = build_meta_task(config, "cpu")
        task.model.train()
        engine = Engine(task.network, config, group)
        clock, seconds = Clock(group.device), []
        for step in range(STEPS):
            start = time.perf_counter()
            engine.step([task.example_batch(config.data.batch_size)], lr_at(step, STEPS, config.optim), clock)
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        memory = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if group.device.type == "cuda":
            memory = float(torch.cuda.max_memory_reserved())
    return Measurement(memory=memory, step_s=min(seconds[1:]), clip_s=_clip_s(task))


def _clip_s(task: Task) -> float | None:
    data = task.config.data
    try:
        reader = open_split(storage.join(data.shards, "train"), data)
    except (StorageError, DataError):  # not written yet
        return None
    clips = ClipSource(reader=reader, processor=task.processor, augment=data)
    torch.set_num_threads(1)
    start = time.process_time()
    for position in range(min(CLIPS, len(reader))):
        clips.example((0, position), clips.fetch(position))
    return (time.process_time() - start) / min(CLIPS, len(reader))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_steps(load_config(sys.argv[1], sys.argv[2:])))))
