"""SIGKILL of real commands and of a real S3 server at random moments; the rerun writes identical bytes."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cli.services import BUCKET, object_storage
from model import storage
from model.data.download.ledger import download_status
from tests.helpers.clients import fresh_clients
from tests.helpers.faulty_server import content, serve
from tests.helpers.paths import MPLUG

KILLS = 20


def run_and_kill(command: list[str], after_s: float) -> int | None:
    """Exit code, or None if the command was killed; asserts that no child process is left."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        child.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        tree = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        child.wait()
        _, alive = psutil.wait_procs(tree, timeout=20)
        assert not alive, f"still running: {alive}"
        return None
    return child.returncode


def kill_until_done(command: list[str], lowest_s: float, highest_s: float) -> int:
    """Kills the command up to KILLS times, then lets it finish; returns the number of kills."""
    rng, killed = random.Random(0), 0
    for _ in range(KILLS):
        killed += run_and_kill(command, rng.uniform(lowest_s, highest_s)) is None
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return killed


def contents(uri: str) -> dict[str, bytes]:
    return {
        entry.path: storage.read(storage.join(uri, entry.path))
        for entry in storage.walk(uri)
        if not entry.path.startswith((".ledger", ".building"))
    }


def test_a_killed_download_ends_with_identical_bytes(tmp_path: Path) -> None:
    names = [f"ok/{number}-20000" for number in range(300)] + ["drop/large-900000"]
    with serve() as address:
        rows = [json.dumps({"url": f"{address}/{name}", "path": name}) for name in names]
        (tmp_path / "list.jsonl").write_text("\n".join(rows))
        command = [MPLUG, "data", "download", str(tmp_path / "list.jsonl"), str(tmp_path), "--rate-limit", "1.5"]
        killed = kill_until_done(command, 0.7, 1.6)
    assert killed >= 5
    raw = str(tmp_path / "raw" / "youku-mplug")
    assert contents(raw) == {name: content(name.partition("/")[2]) for name in names}
    assert download_status(raw).files == len(names)


def test_a_killed_sharding_ends_with_identical_bytes(corpus: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    subprocess.run(shard_command(corpus, str(tmp_path / "whole")), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    # most of it is the start of the command, so a run without any work left can be killed too
    assert kill_until_done(shard_command(corpus, str(tmp_path / "killed")), 0.3 * whole_s, 0.9 * whole_s) >= 10
    whole, killed = (contents(str(tmp_path / root / "shards")) for root in ("whole", "killed"))
    assert len([path for path in whole if path.endswith(".tar")]) > 5
    assert killed == whole


def shard_command(corpus: Path, root: str) -> list[str]:
    options = ["--dataset", "pretrain", "--short-side", "72"]
    return [sys.executable, "-c", SMALL_PARTS, MPLUG, "data", "shard", str(corpus), root, *options]


SMALL_PARTS = """
import sys
from model.data.shards import build
from cli.main import main
build.PART_CLIPS["frames"] = 4
sys.argv = sys.argv[1:]
main()
"""


@contextmanager
def fragile_storage(folder: Path) -> Iterator[None]:
    """A separate S3 server; restores the environment afterwards."""
    before = dict(os.environ)
    try:
        with fresh_clients(), object_storage(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def server_process(folder: Path) -> psutil.Process:
    return next(
        process
        for process in psutil.process_iter(["name", "status", "cmdline"])
        if process.info["name"] == "weed"
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and str(folder) in " ".join(process.info["cmdline"])
    )


@contextmanager
def killing(folder: Path, every_s: float, times: int) -> Iterator[None]:
    """Kills and restarts the storage during the block."""
    restarted: list[subprocess.Popen[bytes]] = []
    finished = threading.Event()

    def kill() -> None:
        for _ in range(times):
            if finished.wait(every_s):
                return
            server = server_process(folder)
            arguments, environment = server.cmdline(), server.environ()
            server.kill()
            time.sleep(0.7)
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            restarted.append(subprocess.Popen(arguments, env=environment, **quiet))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        for process in restarted[:-1]:
            process.wait()


def run_until_done(command: list[str]) -> None:
    """A command reports storage that is unavailable for too long, and resumes when it is repeated."""
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return
        assert done.returncode == 134, done.stderr
        assert "Traceback" not in done.stderr
        time.sleep(1)
    raise AssertionError(done.stderr)


def test_acknowledged_writes_survive_a_kill_of_the_storage(corpus: Path, tmp_path: Path) -> None:
    names = [f"ok/{number}-20000" for number in range(300)]
    folder, root = tmp_path / "s3", f"s3://{BUCKET}/work"
    local, remote = (shard_command(corpus, where) for where in (str(tmp_path / "local"), root))
    subprocess.run(local, check=True, capture_output=True)
    with fragile_storage(folder), serve() as address:
        (tmp_path / "list.txt").write_text("\n".join(f"{address}/{name}" for name in names))
        with killing(folder, every_s=1.5, times=3):
            run_until_done([MPLUG, "data", "download", str(tmp_path / "list.txt"), root, "--rate-limit", "1"])
            run_until_done(remote)
        assert contents(f"{root}/raw/youku-mplug") == {name: content(name[3:]) for name in names}
        assert download_status(f"{root}/raw/youku-mplug").files == len(names)
        assert contents(f"{root}/shards") == contents(str(tmp_path / "local" / "shards"))
        server_process(folder).kill()
