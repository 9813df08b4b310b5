"""`mplug doctor`: runs and prints the checks; checks of this machine, of storage and of MLflow."""

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.doctor.cluster import cluster_checks
from cli.doctor.finding import Finding, failed, fine, warned
from model import storage
from model.errors import UserError

SHM = "/dev/shm"
LEAST_SHM_GB = 1.0
LEAST_DISK_GB = 10.0
MOST_SKEW_S = 60.0
"""Allowed clock skew. S3 refuses requests from a clock that is 15 minutes off."""
PROBE_BYTES = 2**20
NAME_WIDTH = len("NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, kw_only=True)
class Question:
    """Scope of the checks."""

    root: str = ""
    """Folder or URI for all results."""
    tracking_uri: str = ""
    cluster: bool = False
    namespace: str = ""
    nodes: int = 1
    processes: int = 0
    """Processes per node of the job that must fit."""
    gpus: int = 0
    """GPUs that this machine must have."""


def run_checks(question: Question) -> Iterator[Finding]:
    """Yields the findings of all checks. An error of a check is its finding."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("machine", lambda: _machine(question)),
        ("network", _network),
    ]
    if question.root:
        checks.append(("storage", lambda: _storage(question.root)))
    if question.tracking_uri:
        checks.append(("MLflow", lambda: _tracking(question.tracking_uri)))
    if question.cluster:
        checks.append(("cluster", lambda: cluster_checks(question.namespace, question.nodes, question.processes)))
    for name, check in checks:
        try:
            yield from check()
        except (OSError, UserError) as error:
            yield failed(name, " ".join(str(error).split()), "")


def print_findings(question: Question) -> bool:
    """Prints the findings within 80 columns, each followed by its remedy. Returns whether there were no failures."""
    console, fits = Console(highlight=False), True
    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failure": "[red]✗[/]"}
    for finding in run_checks(question):
        fits = fits and finding.kind != "failure"
        table = Table.grid(padding=(0, 2))
        for width in (1, NAME_WIDTH, None):
            table.add_column(width=width)
        table.add_row(marks[finding.kind], escape(finding.check), escape(finding.message))
        if finding.remedy:
            table.add_row("", "", f"[bold]→[/] {escape(finding.remedy)}")
        console.print(table)
    return fits


def _machine(question: Question) -> Iterator[Finding]:
    import torch

    yield fine("Python", f"{sys.version.split()[0]}, torch {torch.__version__}")
    found = torch.cuda.device_count()
    if found < question.gpus:
        remedy = "Check the driver with nvidia-smi, and in a pod its limit of nvidia.com/gpu."
        yield failed("GPUs", f"{found} of {question.gpus}", remedy)
    else:
        yield fine("GPUs", f"{found}" if found else "none: training runs on the CPU")
    total = shutil.disk_usage(SHM).total / 1e9
    if total < LEAST_SHM_GB:
        remedy = (
            "In a pod, mount an emptyDir of medium Memory there (k8s/base/training); in a container, --shm-size=2g."
        )
        yield failed(SHM, f"{total:.2f} GB, loaders need at least {LEAST_SHM_GB:g}", remedy)
    else:
        yield fine(SHM, f"{total:.1f} GB")
    from model.manifest import cache_folder

    cache_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_folder()).free / 1e9
    if free < LEAST_DISK_GB:
        remedy = "Set MPLUG_CACHE to a larger disk, for downloaded weights and clips."
        yield warned("cache", f"{free:.1f} GB free in {cache_folder()}", remedy)
    else:
        yield fine("cache", f"{free:.0f} GB free in {cache_folder()}")


def _network() -> Iterator[Finding]:
    """Checks the variables that select the network interface of NCCL and gloo by prefix."""
    present = sorted(psutil.net_if_addrs())
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        prefixes = wanted.removeprefix("=").split(",")
        if any(name.startswith(prefix) for name in present for prefix in prefixes):
            yield fine(variable, wanted)
        else:
            yield failed(variable, f"{wanted}: no interface of that name", f"Available: {', '.join(present)}.")


def _storage(root: str) -> Iterator[Finding]:
    """Writes, reads and removes an object."""
    folder = storage.join(root, f"doctor-{secrets.token_hex(4)}")
    uri, data = storage.join(folder, "probe"), secrets.token_bytes(PROBE_BYTES)
    storage.write(uri, data)
    try:
        if hashlib.sha256(storage.read(uri)).digest() != hashlib.sha256(data).digest():
            yield failed("storage", f"{root} returns different bytes than were written", "Do not use this storage.")
            return
        skew_s = storage.clock_skew_s(uri)
    finally:
        storage.remove(folder)
    if abs(skew_s) > MOST_SKEW_S:
        yield failed("clock", f"{skew_s:+.0f} s off the clock of the storage", "Run an NTP client on this machine.")
    yield fine("storage", f"{root} can be written, read and removed")


def _tracking(uri: str) -> Iterator[Finding]:
    from model import registry
    from model.errors import TrackingError

    try:
        version = registry.check_tracking(uri)
    except TrackingError as error:
        message = str(error)
        remedy = "Check that the server runs, and that network policies allow access from this pod."
        if "403" in message or "Invalid Host" in message:
            remedy = "Add its host name to MLFLOW_SERVER_ALLOWED_HOSTS of the server (k8s/base/mlflow)."
        yield failed("MLflow", message, remedy)
        return
    yield fine("MLflow", f"{uri} accepts runs; client {version}")
