"""The download ledger: <raw>/.ledger/*.parquet, one row for every outcome of every file.

The ledger is append-only and has many writers; each of its files holds some thousand rows, and the last row of a path
is valid. Ten million rows are streamed, and only a hash of each is kept in memory.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model import storage
from model.data.annotations import LEDGER, hashed
from model.errors import DataError, StorageError

SEGMENT_ROWS = 20_000
FLUSH_S = 5.0
DONE, FAILED = "done", "failed"
SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the raw dataset
        ("identity", pa.string()),  # version of the file at the source
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("time_ms", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one file."""

    path: str
    identity: str
    status: str
    size: int = 0
    sha256: str = ""
    reason: str = ""


class Ledger:
    """Writes outcomes. Outcomes that were not yet written when the process is killed are downloaded again."""

    def __init__(self, raw: str, writer: str) -> None:
        self.base = storage.join(raw, LEDGER, f"{int(time.time() * 1000):013d}-{writer}")
        self.rows: list[dict[str, Any]] = []
        self.segment, self.flushed = 0, time.monotonic()
        self.lock = threading.Lock()

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self.rows.append({**vars(outcome), "time_ms": int(time.time() * 1000)})
            if len(self.rows) >= SEGMENT_ROWS or time.monotonic() - self.flushed > FLUSH_S:
                try:
                    self._flush()
                except StorageError:  # a short outage: the rows are kept, and `close` must succeed
                    self.flushed = time.monotonic()

    def close(self) -> None:
        with self.lock:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(self.rows, SCHEMA), buffer, compression="zstd")
            storage.write(f"{self.base}-{self.segment:05d}.parquet", buffer.getvalue().to_pybytes())
        if len(self.rows) >= SEGMENT_ROWS:
            self.segment, self.rows = self.segment + 1, []
        self.flushed = time.monotonic()


class Done:
    """The set of files that are done."""

    def __init__(self, raw: str) -> None:
        paths, files, done = [], [], []
        for _, table in _segments(raw, ["path", "identity", "status"]):
            rows = table.to_pydict()
            paths.append(np.array([hashed(path) for path in rows["path"]], np.uint64))
            pairs = zip(rows["path"], rows["identity"], strict=True)
            files.append(np.array([hashed(*pair) for pair in pairs], np.uint64))
            done.append(np.array([status == DONE for status in rows["status"]]))
        last = _last(paths)
        self.files = np.sort(np.concatenate(files)[last & np.concatenate(done)]) if files else np.empty(0, np.uint64)

    def __contains__(self, file: tuple[str, str]) -> bool:
        wanted = np.uint64(hashed(*file))
        place = int(np.searchsorted(self.files, wanted))
        return place < len(self.files) and bool(self.files[place] == wanted)


def outcomes(raw: str) -> Iterator[Outcome]:
    """The last outcome of every file in the ledger. Raises DataError if there is no ledger."""
    paths, lengths = [], {}
    for name, table in _segments(raw, ["path"]):
        paths.append(np.array([hashed(path) for path in table["path"].to_pylist()], np.uint64))
        lengths[name] = len(table)
    if not paths:
        raise DataError(f"{raw} has no download ledger ({LEDGER}/); run `mplug data download` first.")
    is_last = iter(_last(paths))
    for name, length in lengths.items():
        table = _read(raw, name)[:length]  # a writer may have appended rows since
        for item in table.drop_columns(["time_ms"]).to_pylist():
            if next(is_last):
                yield Outcome(**item)


@dataclass(kw_only=True)
class Status:
    """Counts of a raw dataset."""

    files: int
    bytes: int
    failed: Counter[str]
    """Number of failed files by reason."""
    examples: list[Outcome]
    """Some of them."""


def download_status(raw: str, examples: int = 10) -> Status:
    found = Status(files=0, bytes=0, failed=Counter(), examples=[])
    for outcome in outcomes(raw):
        if outcome.status == DONE:
            found.files += 1
            found.bytes += outcome.size
        else:
            found.failed[outcome.reason.partition(":")[0]] += 1
            if len(found.examples) < examples:
                found.examples.append(outcome)
    return found


def _segments(raw: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    base = storage.join(raw, LEDGER)
    for name in sorted(entry.path for entry in storage.walk(base)):
        if name.endswith(".parquet"):
            yield name, _read(raw, name, columns)


def _read(raw: str, name: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read(storage.join(raw, LEDGER, name))), columns=columns)


def _last(paths: list[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """The rows that are the last of their path."""
    whole = np.concatenate(paths) if paths else np.empty(0, np.uint64)
    is_last = np.zeros(len(whole), bool)
    _, first = np.unique(whole[::-1], return_index=True)
    is_last[len(whole) - 1 - first] = True
    return is_last
