"""A size-limited cache of immutable entries on local disk, shared by all processes of a machine.

Entries appear by rename, so a reader never sees a partial one, and a killed process leaves only a file that the next
sweep removes. No process counts bytes: inserting an entry triggers a sweep with a probability proportional to its size.
This keeps the limit, to about 1/64, for any number of processes that come and go.
"""

import fcntl
import hashlib
import os
import random
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER_BYTES = 256 * 2**20
"""A sweep reads one folder. The number of folders is chosen so that each has about this size."""
KEPT = 0.9
"""Share of the limit that remains after a sweep."""
ABANDONED_S = 600.0
PARTIAL = ".partial"


@dataclass(frozen=True)
class Cache:
    """Entries below `folder`, at most `limit` bytes in total. The oldest entries are removed first."""

    folder: Path
    limit: int

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The cached entry, or the result of `fetch`, which is then cached. A full disk only costs speed."""
        path = self._path(key)
        try:
            stored = path.read_bytes()
            if zlib.crc32(stored[:-4]).to_bytes(4) == stored[-4:]:
                return stored[:-4]
        except OSError:  # missing or unreadable
            pass
        data = fetch()
        try:
            self._put(path, data)
        except OSError:  # full or read-only
            pass
        return data

    @property
    def folders(self) -> int:
        return max(1, min(4096, self.limit // FOLDER_BYTES))

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / f"{int(name[:8], 16) % self.folders:03x}" / name

    def _put(self, path: Path, data: bytes) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):08x}{PARTIAL}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data + zlib.crc32(data).to_bytes(4))
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        if random.random() < len(data) / (self.limit / self.folders / 64):
            self._sweep(path.parent)

    def _sweep(self, folder: Path) -> None:
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process is sweeping
                return
            with os.scandir(folder) as items:
                found = list(_stats(item for item in items if item.name != "lock"))
            now, left = time.time(), self.limit / self.folders
            total = sum(size for _, size, _ in found)
            for written, size, path in sorted(found):
                is_abandoned = path.endswith(PARTIAL) and now - written > ABANDONED_S
                if is_abandoned or (total > left * KEPT and not path.endswith(PARTIAL)):
                    Path(path).unlink(missing_ok=True)
                    total -= size


def open_cache(folder: Path, limit: int) -> Cache:
    """A cache below `folder`. Entries of a cache with another limit are removed, because their paths differ."""
    cache = Cache(folder / str(limit), limit)
    for other in folder.glob("*"):
        if other.name != str(limit):
            shutil.rmtree(other, ignore_errors=True)
    return cache


def _stats(pieces: Iterator["os.DirEntry[str]"]) -> Iterator[tuple[float, int, str]]:
    """Time, size and path of each entry that still exists."""
    for item in pieces:
        try:
            yield item.stat().st_mtime, item.stat().st_size, item.path
        except FileNotFoundError:
            continue
