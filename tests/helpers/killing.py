"""Real training runs with injected faults, and their outcomes."""

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from model import storage
from tests.helpers.paths import MPLUG
from tests.helpers.running import TINY

STEPS = 12
LENGTH = (*TINY, f"training.steps={STEPS}", "checkpoint.every=4")


@dataclass(frozen=True)
class Outcome:
    code: int
    model: str
    stderr: str

    @property
    def weights(self) -> str:
        return hashlib.sha256(storage.read(storage.join(self.model, "model.safetensors"))).hexdigest()

    @property
    def history(self) -> list[dict[str, Any]]:
        lines = storage.read(storage.join(self.model, "history.jsonl")).splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        return [point["train/loss"] for point in self.history]


@dataclass(frozen=True)
class Training:
    """A run of `mplug train` in a separate folder or prefix."""

    root: Path | str
    settings: list[str]
    preset: str = "tiny_pretraining"
    length: Sequence[str] = LENGTH

    def command(self, *overrides: str) -> list[str]:
        return [MPLUG, "train", self.preset, *self.length, f"output={self.root}", *self.settings, *overrides]

    def start(self, *overrides: str, processes: int = 2) -> subprocess.Popen[str]:
        command = self.command("--processes", str(processes), *overrides)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def end(self, child: subprocess.Popen[str]) -> Outcome:
        out, err = child.communicate(timeout=200)
        return Outcome(child.returncode, out.strip(), err)

    def run(self, *overrides: str, processes: int = 2) -> Outcome:
        return self.end(self.start(*overrides, processes=processes))

    def interrupted(
        self, do: Callable[[subprocess.Popen[str]], None], *overrides: str, step: int = 4, processes: int = 2
    ) -> Outcome:
        """Calls `do` once the checkpoint of `step` exists."""
        child = self.start(*overrides, processes=processes)
        self.wait_for(step, child)
        do(child)
        return self.end(child)

    def wait_for(self, step: int, child: subprocess.Popen[str]) -> None:
        """Returns when the checkpoint of `step` exists."""
        where = storage.join(str(self.root), "checkpoints")
        while not any(f"step-{step:08d}/manifest.json" in entry.path for entry in storage.walk(where)):
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.02)


def workers(child: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes of a command, ordered by rank."""
    found = psutil.Process(child.pid).children(recursive=True)
    read = {item: environment(item) for item in found}  # once: a process may end at any time, and has none then
    ranks = {
        item: int(variables["LOCAL_RANK"]) for item, variables in read.items() if "TORCHELASTIC_RUN_ID" in variables
    }
    pids = {item.pid for item in ranks}
    firsts = [item for item in ranks if item.ppid() not in pids]  # excludes loader processes
    return sorted(firsts, key=ranks.__getitem__)


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
