import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.data.cache import PARTIAL, Cache

WORKER = """
import random, sys
from pathlib import Path
from model.data.cache import Cache
folder, limit, seed, reads = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
cache, rng = Cache(folder, limit), random.Random(seed)
def piece(key):
    return random.Random(key).randbytes(20_000)
for _ in range(reads):
    key = f"clip-{rng.randrange(400)}"
    assert cache.get(key, lambda: piece(key)) == piece(key), key
"""


def worker(folder: Path, limit: int, seed: int, reads: int = 1500) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(limit), str(seed), str(reads)])


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refuse() -> bytes:
    raise AssertionError("it should be in the cache")


def test_a_piece_is_fetched_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10**6)
    assert cache.get("a", lambda: b"one") == b"one"
    assert cache.get("a", refuse) == b"one"
    assert Cache(tmp_path, 10**6).get("a", refuse) == b"one"  # of another process


@pytest.mark.parametrize("length", [500, 3, 0])
def test_a_damaged_piece_is_fetched_again(tmp_path: Path, length: int) -> None:
    cache = Cache(tmp_path, 10**6)
    cache.get("a", lambda: b"x" * 1000)
    (piece,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock")  # a sweep is random
    piece.write_bytes(piece.read_bytes()[:length])
    assert cache.get("a", lambda: b"new") == b"new"
    assert cache.get("a", refuse) == b"new"


def test_the_size_limit_holds_and_the_newest_pieces_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 200_000)
    for number in range(500):
        cache.get(str(number), lambda: bytes(5000))
        assert size(tmp_path) < 230_000
    assert cache.get("499", refuse) == bytes(5000)


@pytest.mark.parametrize("limit", [2_000_000, 100_000_000])
def test_processes_share_the_cache_and_see_complete_pieces_only(tmp_path: Path, limit: int) -> None:
    workers = [worker(tmp_path, limit, seed) for seed in range(4)]
    assert [process.wait(timeout=60) for process in workers] == [0, 0, 0, 0]
    assert size(tmp_path) < limit * 1.1


def test_the_cache_survives_killed_processes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for seed in range(10):
        process = worker(tmp_path, 2_000_000, seed, reads=10**6)
        time.sleep(rng.uniform(0.2, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert worker(tmp_path, 2_000_000, 99).wait(timeout=60) == 0
    assert size(tmp_path) < 2_300_000


def test_partial_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 50_000)
    cache.get("a", lambda: bytes(1000))
    folder = next(path for path in tmp_path.iterdir())
    abandoned = folder / f"x.1.{PARTIAL}"
    abandoned.write_bytes(bytes(1000))
    os.utime(abandoned, (0, 0))
    for number in range(200):
        cache.get(str(number), lambda: bytes(1000))
    assert not abandoned.exists()


def test_a_full_disk_only_disables_the_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    assert Cache(blocked, 10**6).get("a", lambda: b"one") == b"one"
