"""Out-of-memory kills in a real cgroup."""

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import memory_limit
from model.training import attempts
from tests.helpers.killing import Training

CGROUPS = next((path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if path.is_dir()), Path("/"))
LIMIT = 250 * 2**20
"""Enough for the process that counts starts, too little for training."""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup with this limit, v1 or v2 like the machine."""
    folder = CGROUPS / f"mplug-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        limit = "memory.limit_in_bytes" if (folder / "memory.limit_in_bytes").exists() else "memory.max"
        (folder / limit).write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no cgroup can be created here: {error}")
    yield folder
    folder.rmdir()


def test_a_run_that_exceeds_memory_fails_permanently(
    cgroup: Path, shards: dict[str, str], decoder: str, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}", "checkpoint.max_attempts=2"]
    run = Training(tmp_path, settings)
    ended = subprocess.run(
        run.command("--processes", "1"),
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid())),
    )
    assert ended.returncode == 4, ended.stderr
    killed = "OOM-killed at the pod's limit of 250 MiB: raise it in PodTemplate training"
    assert len(re.findall(f"^error: a process was {killed}", ended.stderr, re.MULTILINE)) == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the run was started 2 times without a checkpoint after step 0")
    assert killed in last
    (folder,) = tmp_path.glob("checkpoints/*")
    assert attempts.read_attempt(str(folder)).restarts_without_progress == 2
    again = subprocess.run(run.command("--processes", "1"), capture_output=True, text=True, timeout=200)
    assert (again.returncode, again.stderr.strip()) == (4, last)  # a new pod does not reset the count


def tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


V1 = {"memory.limit_in_bytes": "471859200\n", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}
V2 = {"memory.max": "471859200\n", "memory.events": "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n"}


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", V2),
        ("0::/kubepods/pod1/c\n", V2),  # a container without a cgroup namespace, whose cgroup is mounted
        ("0::/kubepods/c\n", {f"kubepods/c/{name}": text for name, text in V2.items()}),
        ("9:memory:/\n0::/\n", {f"memory/{name}": text for name, text in V1.items()}),
        ("9:memory:/kubepods/pod1/c\n", {f"memory/{name}": text for name, text in V1.items()}),
        ("4:cpu:/c\n9:hugetlb,memory:/c\n", {f"memory/c/{name}": text for name, text in V1.items()}),
    ],
)
def test_limit_and_kills_are_read_from_cgroup_v1_and_v2(
    own: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"own": own, **{f"mount/{name}": text for name, text in files.items()}})
    monkeypatch.setattr(memory_limit, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_limit, "MOUNT", tmp_path / "mount")
    assert (memory_limit.memory_limit(), memory_limit.memory_kills()) == (450 * 2**20, 3)


@pytest.mark.parametrize("text", ["max\n", f"{2**63 - 4096}\n"])
def test_no_limit_is_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"own": "0::/\n9:memory:/\n", "mount/memory.max": text, "mount/memory/memory.limit_in_bytes": text})
    monkeypatch.setattr(memory_limit, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_limit, "MOUNT", tmp_path / "mount")
    assert (memory_limit.memory_limit(), memory_limit.memory_kills()) == (None, 0)
