"""Compares two ways to compute the same, "plain" and "ours". Each measurement runs in a new process, interleaved.

A job is called with the way and the device. It returns a function to measure, whose result is reported, and how often.
Memory is the peak during the function, without weights and program.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Job = Callable[[str, str], tuple[Callable[[], object], int]]
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
"""Makes glibc return freed memory, so that the peak is that of live tensors. Slower, so not used for timing."""
RESULTS = Path(__file__).parent / "results"


def measure(jobs: Mapping[str, Job], job: str, path: str, device: str) -> None:
    """Prints one measurement as JSON."""
    torch.set_num_threads(2 if device == "cpu" else torch.get_num_threads())
    torch.manual_seed(1)
    function, repeats = jobs[job](path, device)
    before = _resident_mib(device)
    function()  # warm-up: allocations and caches
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    found = {"s": statistics.median(seconds), "peak_mib": _peak_mib(device), "before_mib": before, "result": result}
    print(json.dumps(found))


def _resident_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(module: str, job: str, path: str, device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """One measurement of a module that calls `run`."""
    command = [sys.executable, "-m", module, "--measure", job, path, "--device", device]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def _summary(seconds: list[float], memory: dict[str, Any]) -> dict[str, Any]:
    step_mib = memory["peak_mib"] - memory["before_mib"]
    return {"s": statistics.median(seconds), "step_mib": step_mib, "result": memory["result"]}


def compare(module: str, jobs: Iterable[str], rounds: int, device: str) -> dict[str, Any]:
    """Prints and returns the measurements of all jobs of a module that calls `run`."""
    rows = {}
    for job in jobs:
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(rounds):
            for path, found in seconds.items():
                found.append(measured(module, job, path, device, {})["s"])
        plain, ours = (_summary(seconds[path], measured(module, job, path, device, RETURN_FREED)) for path in seconds)
        faster, memory = plain["s"] / ours["s"], ours["step_mib"] / plain["step_mib"]
        rows[job] = {"plain": plain, "ours": ours, "times_faster": faster, "memory": memory}
        times = f"{plain['s']:7.3f} s -> {ours['s']:7.3f} s   {faster:5.2f} x"
        mib = f"{plain['step_mib']:6.0f} MiB -> {ours['step_mib']:6.0f} MiB   {memory:.2f} x"
        print(f"{job:32} {times}   {mib}", flush=True)
    return rows


def write_report(name: str, rows: dict[str, Any], device: str, **facts: object) -> None:
    """Writes benchmarks/results/<name>-<device>.json, without the results of the jobs."""
    for row in rows.values():
        del row["plain"]["result"], row["ours"]["result"]
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    report = {"machine": machine, "torch": torch.__version__, **facts, "jobs": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{device}.json").write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return f"{model.partition(': ')[2]}, 2 threads"


def run(description: str, jobs: Mapping[str, Job], report: Callable[[int, str], None]) -> None:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each path")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", nargs=2, metavar=("JOB", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(jobs, *arguments.measure, arguments.device)
    else:
        report(arguments.rounds, arguments.device)
