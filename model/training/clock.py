"""Measures the time of the sections of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by section since the last `flush`. On a GPU, the time of the computation, not of its launch."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start = time.perf_counter()

    @contextmanager
    def section(self, name: str, *, computes: bool = True) -> Iterator[None]:
        """Times a block. Set `computes` to False for a block that does not wait for the GPU."""
        if self.on_gpu and computes:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self.events.append((name, begin, end))
            return
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def flush(self) -> tuple[dict[str, float], float]:
        """Seconds by section, and the total time since the last call."""
        if self.events:
            torch.cuda.synchronize()
            for name, begin, end in self.events:
                self.seconds[name] += begin.elapsed_time(end) / 1000
            self.events.clear()
        now = time.perf_counter()
        sections, passed = dict(self.seconds), now - self.start
        self.seconds.clear()
        self.start = now
        return sections, passed
