"""Speed and resource usage of a run, per logging interval."""

import os
import resource
from collections.abc import Mapping, Sequence

import psutil
import torch

from model.data.loading.loader import Batch
from model.distributed import Processes
from model.training.clock import Clock
from model.training.flops import peak_flops

SECTIONS = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation")
COUNTED = ("tokens", "flops", "peak", "node", "reports")


class Meter:
    """Counts between two calls of `flush`, which merges the counts of all processes."""

    def __init__(self, clock: Clock, group: Processes, dtype: torch.dtype) -> None:
        self.clock, self.group = clock, group
        self.peak_flops = peak_flops(group.device, dtype)
        self.steps = self.clips = self.tokens = 0
        self.network_bytes = _network_bytes()
        psutil.cpu_percent()  # the first call only starts the measurement

    def count(self, micro_batches: Sequence[Batch], clips: int) -> None:
        """Counts one step over `micro_batches` of this process, with `clips` summed over all processes."""
        self.steps += 1
        self.clips += clips
        self.tokens += sum(_tokens(batch) for batch in micro_batches)

    def flush(self, steps_left: int, step_flops: float) -> dict[str, float]:
        """Metrics of the interval. A step takes `step_flops` on this process. All processes must call it together."""
        seconds, passed_s = self.clock.flush()
        own = {name: seconds.get(name, 0.0) for name in SECTIONS}
        own |= {"flops": step_flops * self.steps, "peak": self.peak_flops * passed_s, "tokens": float(self.tokens)}
        own |= {
            "reports": float(os.environ.get("LOCAL_RANK", "0") == "0"),
            "node": float(os.environ.get("GROUP_RANK", 0)),
            **self._machine(passed_s),
        }
        rows = self.group.table(own)
        speed = {
            "perf/clips_per_s": self.clips / passed_s,
            "perf/tokens_per_s": sum(rows["tokens"]) / passed_s,
            "perf/step_s": passed_s / self.steps,
            "perf/tflops": sum(rows["flops"]) / passed_s / 1e12,
            "perf/mfu": sum(rows["flops"]) / sum(rows["peak"]),
            "perf/data_wait_share": _mean(rows["data"]) / passed_s,
            "perf/eta_hours": steps_left * passed_s / self.steps / 3600,
            **{f"perf/{name}_s": _mean(rows[name]) / self.steps for name in SECTIONS},
        }
        self.steps = self.clips = self.tokens = 0
        return {**speed, **_by_node(rows)}

    def _machine(self, passed_s: float) -> dict[str, float]:
        """System metrics of this machine and process."""
        sent_before, self.network_bytes = self.network_bytes, _network_bytes()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_percentage": psutil.virtual_memory().percent,
            "process_memory_peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "network_megabytes_per_s": (self.network_bytes - sent_before) / 1e6 / passed_s,
        }
        if torch.cuda.is_available():
            found["gpu_memory_peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        return found


def _by_node(rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """system/node-<n>/… from the first process of each node; for process memory, the maximum over the node."""
    found: dict[str, float] = {}
    for name in rows.keys() - {*SECTIONS, *COUNTED}:
        for node, reports, value in zip(rows["node"], rows["reports"], rows[name], strict=True):
            key = f"system/node-{node:.0f}/{name}"
            if "process" in name or "gpu" in name:
                found[key] = max(found.get(key, 0.0), value)
            elif reports:
                found[key] = value
    return found


def _tokens(batch: Batch) -> int:
    """Text tokens that the decoder reads, without padding."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def _network_bytes() -> int:
    counters = psutil.net_io_counters()
    return int(counters.bytes_sent + counters.bytes_recv) if counters else 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
