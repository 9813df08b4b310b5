"""`mplug plan`: prints the estimated resources of a run."""

import json
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from model.config.load import load_config
from model.config.schema import RunConfig, count_in_steps, micro_batch_size
from model.data.shards.reader import read_dataset_info
from model.errors import ConfigError, ProcessFailedError, StorageError
from model.training.flops import GPUS
from model.training.planning.estimate import Measurement, Memory, RunPlan, plan_run

USABLE = 0.92
"""Usable share of a GPU's memory; the rest is lost to fragmentation."""
MFU_RANGE = (0.25, 0.45)
"""Share of the peak that published trainers of this size reach. Not measured here."""
CLIP_S = {"frames": (0.004, 0.02), "original": (0.1, 0.6)}
"""CPU seconds per clip in training, by the form of the shards (docs/data.md)."""
CLIP_BYTES = {"frames": (0.1e6, 0.4e6), "original": (0.6e6, 4e6)}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    nodes: int
    gpus: int
    """Per node; 0: processes on CPUs, one per node."""
    gpu: str
    price: float
    """Price of a GPU hour."""

    @property
    def processes(self) -> int:
        return self.nodes * max(self.gpus, 1)


def print_plan(config: str, overrides: list[str], hardware: Hardware, *, clips: int, measured: bool) -> bool:
    """Prints the plan. Returns False if the run does not fit."""
    run, overrides = _loaded(config, overrides)
    form, clips = _dataset(run, clips)
    run = count_in_steps(run, clips) if clips or run.training.steps else run
    found = plan_run(run, hardware.processes, on_cpu=not hardware.gpus)
    measurement = _measure(config, overrides, found.micro_batch) if measured else None
    console = Console()
    memory = _memory_bytes(run, hardware, found, measurement)
    console.print(_memory_table(found.memory, memory, measurement, on_cpu=not hardware.gpus))
    console.print(_facts(run, hardware, found, measurement, form))
    limit = GPUS[hardware.gpu].memory * USABLE if hardware.gpus else None
    if limit is None or memory <= limit:
        return True
    usable = f"{limit / 1e9:.1f} GB are usable on this GPU ({hardware.gpu})"
    console.print(f"[bold red]does not fit[/]: it needs {memory / 1e9:.1f} GB, {usable}.")
    console.print(_remedy(run, hardware, limit), markup=False)
    return False


def _loaded(config: str, overrides: list[str]) -> tuple[RunConfig, list[str]]:
    """A configuration whose weights and data need not exist yet, and its overrides."""
    try:
        return load_config(config, overrides), overrides
    except ConfigError:
        completed = ["model.decoder=none", "data.shards=none", *overrides]
        return load_config(config, completed), completed


def _dataset(run: RunConfig, clips: int) -> tuple[str, int]:
    """Form of the shards, and the number of clips in an epoch."""
    try:
        facts = read_dataset_info(run.data.shards)
        return facts["form"]["kind"], clips or facts["clips"]["train"]
    except StorageError:
        if not clips and not run.training.steps:
            raise ConfigError("data.shards does not exist yet: give the number of clips with --clips.") from None
        return "frames", clips


def _measure(config: str, overrides: list[str], micro_batch: int) -> Measurement:
    settings = [*overrides, f"data.batch_size={micro_batch}", "training.gradient_accumulation=1"]
    command = [sys.executable, "-m", "model.training.planning.measure", config, *settings]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise ProcessFailedError(f"a step over {micro_batch} clips cannot be measured here: {last}", ended.returncode)
    return Measurement(**json.loads(ended.stdout.splitlines()[-1]))


def _memory_bytes(run: RunConfig, hardware: Hardware, found: RunPlan, measured: Measurement | None) -> float:
    """Memory of one process: the estimate, or a measurement on this machine, adapted to sharded state."""
    on_cpu = not hardware.gpus
    host = found.memory.host if on_cpu else 0.0
    if not measured:
        return found.memory.device + host
    alone = run.model_copy(
        update={
            "data": run.data.model_copy(update={"batch_size": found.micro_batch}),
            "training": run.training.model_copy(update={"gradient_accumulation": 1}),
        }
    )
    return measured.memory - plan_run(alone, 1, on_cpu=on_cpu).memory.device + found.memory.device + host


def _memory_table(memory: Memory, total: float, measured: Measurement | None, *, on_cpu: bool) -> Table:
    table = Table(title=f"memory per {'process' if on_cpu else 'GPU'}, GB", title_justify="left")
    table.add_column("for")
    table.add_column("", justify="right")
    parts = {
        "Python, torch, DeepSpeed": memory.runtime,
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    if on_cpu:
        parts["copy for a checkpoint"] = memory.host
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    if measured:
        table.add_row("other, measured here", f"{(total - sum(parts.values())) / 1e9:+.2f}")
    table.add_section()
    table.add_row("[bold]total[/]", f"[bold]{total / 1e9:.2f}[/]")
    return table


def _facts(run: RunConfig, hardware: Hardware, found: RunPlan, measured: Measurement | None, form: str) -> Table:
    table = Table(show_header=False, box=None)
    shared = f"{found.processes} processes x {run.training.gradient_accumulation} x {found.micro_batch} clips"
    table.add_row("parameters", f"{found.trained:,} trained, {found.frozen:,} frozen")
    table.add_row("batch", f"{run.data.batch_size} clips = {shared}")
    table.add_row("checkpoint", f"{found.checkpoint_bytes:,} bytes; {run.checkpoint.keep} and the best are kept")
    table.add_row("model", f"{found.model_bytes:,} bytes")
    if hardware.gpus:
        table.add_row(
            "host memory per GPU",
            f"{found.memory.host / 1e9:.2f} GB for the copy of a checkpoint; loader processes in addition",
        )
    fast, slow = _step_seconds(run, hardware, found, measured)
    table.add_row("operations per step", f"{found.step_flops / 1e12:,.2f} TFLOP")
    table.add_row("step", f"{fast:.3g} to {slow:.3g} s" if slow > fast else f"{fast:.3g} s, as measured here")
    if steps := run.training.steps:
        hours = [steps * seconds / 3600 for seconds in (fast, slow)]
        table.add_row("run", f"{steps:,} steps, {hours[0]:,.1f} to {hours[1]:,.1f} hours")
        if hardware.gpus:
            least, most = (hour * found.processes for hour in hours)
            cost = f", {least * hardware.price:,.0f} to {most * hardware.price:,.0f}" if hardware.price else ""
            table.add_row("GPU-hours, cost", f"{least:,.0f} to {most:,.0f}{cost}")
    rate = run.data.batch_size / fast
    low, high = (measured.clip_s,) * 2 if measured and measured.clip_s else CLIP_S[form]
    table.add_row("clips to read", f"at most {rate:,.1f} per second ({form} shards)")
    table.add_row(
        "decode cores", f"{rate * low:,.1f} to {rate * high:,.1f}, data.workers has {run.data.workers} per process"
    )
    if run.data.workers:
        shared_gb = _shared_bytes(run, hardware, found) / 1e9
        table.add_row("/dev/shm per node", f"{shared_gb:,.1f} GB for batches read ahead")
    small, large = CLIP_BYTES[form]
    table.add_row("from storage", f"{rate * small / 1e6:,.1f} to {rate * large / 1e6:,.1f} MB per second")
    return table


def _shared_bytes(run: RunConfig, hardware: Hardware, found: RunPlan) -> float:
    """Every loader process has two batches ready, in uint8."""
    vision = run.model.vision
    clip = 3 * vision.num_frames * vision.image_size**2
    return 2 * run.data.workers * found.micro_batch * clip * max(hardware.gpus, 1)


def _step_seconds(
    run: RunConfig, hardware: Hardware, found: RunPlan, measured: Measurement | None
) -> tuple[float, float]:
    """Expected range. It includes communication between processes, which is not measured."""
    if measured:
        seconds = measured.step_s * run.training.gradient_accumulation
        return seconds, seconds
    if not hardware.gpus:
        raise ConfigError("the speed of a CPU must be measured: add --measure.")
    peak = GPUS[hardware.gpu].bf16_peak * found.processes
    return found.step_flops / (peak * MFU_RANGE[1]), found.step_flops / (peak * MFU_RANGE[0])


def _remedy(run: RunConfig, hardware: Hardware, limit: float) -> str:
    """The smallest change that makes the run fit."""
    parts = ["vision", "abstractor", "decoder"]
    accumulation = run.training.gradient_accumulation
    tries: list[dict[str, object]] = [{"zero_stage": 2}, {"activation_checkpointing": tuple(parts)}]
    tries += [{"activation_checkpointing": tuple(parts), "gradient_accumulation": accumulation * n} for n in (2, 4, 8)]
    tries += [{"zero_stage": 3, "activation_checkpointing": tuple(parts), "gradient_accumulation": accumulation * 8}]
    for changes in tries:
        other = run.model_copy(update={"training": run.training.model_copy(update=changes)})
        try:
            micro_batch_size(other, hardware.processes)
        except ConfigError:
            continue
        size = plan_run(other, hardware.processes).memory.device
        if size <= limit:
            settings = " ".join(f"training.{key}={_yaml(value)}" for key, value in changes.items())
            return f"It fits ({size / 1e9:.1f} GB) with: {settings}"
    return "No setting makes it fit; use more or larger GPUs, or a smaller data.batch_size."


def _yaml(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
