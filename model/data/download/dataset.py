"""Copies a published dataset to <root>/raw/<dataset>: `mplug data download SOURCE ROOT`.

A file becomes visible when it is complete. A ledger records which files are done and why others failed. The same
command resumes an interrupted download, retries failed files and fetches changed ones. Machines share the work by
partitions; the path of a file determines its partition.
"""

import fcntl
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from model import storage
from model.data.annotations import LEDGER
from model.data.download.fetch import RetryPolicy, Throttle, fetch_file
from model.data.download.http import FetchError
from model.data.download.ledger import DONE, FAILED, Done, Ledger, Outcome, outcomes
from model.data.download.modelscope import SCHEME, ModelScopeSource
from model.data.download.sources import ManifestSource, Remote, Source, StorageSource, is_http
from model.data.prefetch import in_order
from model.errors import DataError, NotFoundError, OutageError
from model.manifest import cache_folder
from model.progress import progress

LISTED_AHEAD = 50_000
"""Files that are listed ahead of the transfers, for the estimate of the remaining time."""
SHOWN = 5
LISTS = {".csv", ".tsv", ".jsonl", ".txt"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to fetch, and how."""

    only: Sequence[str] = ()
    """Path patterns; empty: all files."""
    index: int = 0
    count: int = 1
    """This process downloads partition `index` of `count`."""
    threads: int = 32
    rate: float = 0.0
    """Bytes per second; 0: no limit."""
    max_failed: float = 0.0
    """Share of files that may fail before the download counts as failed."""
    policy: RetryPolicy = field(default_factory=RetryPolicy)


def in_partition(path: str, index: int, count: int) -> bool:
    """Whether a file belongs to partition `index` of `count`, which depends on its path alone."""
    return zlib.crc32(path.encode()) % count == index


def open_source(source: str) -> Source:
    """Selects the kind of source by its name."""
    if source.startswith(SCHEME):
        return ModelScopeSource(source.removeprefix(SCHEME))
    suffix = PurePosixPath(source.partition("?")[0]).suffix
    if is_http(source) or (suffix in LISTS and Path(source).is_file()):
        return ManifestSource(source)
    return StorageSource(source)


def download_dataset(
    source: str | Source, root: str, dataset: str = "youku-mplug", options: Options | None = None
) -> tuple[str, dict[str, float]]:
    """Copies a source to <root>/raw/<dataset>. Returns that URI, and counts of files and bytes.

    Raises DataError if files could not be downloaded, or OutageError if the only reason is that the source does not
    answer. All other files are downloaded first.
    """
    options = options or Options()
    opened = open_source(source) if isinstance(source, str) else source
    raw = storage.join(root, "raw", dataset)
    name = f"{options.index + 1}of{options.count}"
    if isinstance(source, str) and f"{raw}/".startswith(f"{source.rstrip('/')}/"):
        raise DataError(f"{raw} must not lie inside its source, {source}: it would be copied into itself.")
    job = _Job(opened, raw, options, Ledger(raw, name), Throttle(options.rate), _spool(raw) / name)
    bar: tqdm[Any] = progress(
        total=0, desc=f"downloading to {raw}" + (f" {name}" if options.count > 1 else ""), unit="file"
    )
    facts = {"files": 0.0, "files_copied": 0.0, "bytes_copied": 0.0, "files_failed": 0.0}
    failed: list[Outcome] = []
    with _locked(job.spool), ThreadPoolExecutor(options.threads) as pool, bar:
        try:
            for future in in_order(job.begin(pool, facts), LISTED_AHEAD):
                outcome = future.result()
                bar.total = int(facts["files"])
                if outcome is not None:
                    is_done = outcome.status == DONE
                    facts["files_copied" if is_done else "files_failed"] += 1
                    facts["bytes_copied"] += outcome.size
                    failed += [outcome] * (not is_done and len(failed) < SHOWN)
                    if bar.n % 100 == 0:
                        done = f"{facts['bytes_copied'] / 1e9:.2f}"
                        bar.set_postfix(GB=done, failed=int(facts["files_failed"]), refresh=False)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            job.ledger.close()
    if facts["files_failed"] > options.max_failed * facts["files"]:
        lines = [f"{outcome.path}: {outcome.reason}" for outcome in failed]
        lines.append(
            f"{facts['files_failed']:.0f} of {facts['files']:.0f} files could not be downloaded. Run the command again "
            f"to retry them, `mplug data status {raw}` to count the reasons, or allow failures with --max-failed."
        )
        raise (OutageError if job.is_outage else DataError)("\n".join(lines))
    return raw, facts


@dataclass
class _Job:
    source: Source
    raw: str
    options: Options
    ledger: Ledger
    throttle: Throttle
    spool: Path
    is_outage: bool = True
    """Whether all failures so far are outages of the source."""

    def begin(self, pool: ThreadPoolExecutor, facts: dict[str, float]) -> Iterator["Future[Outcome | None]"]:
        """A future for each file of this partition. Its result is None if the file was downloaded before."""
        done = Done(self.raw)
        nothing: Future[Outcome | None] = Future()
        nothing.set_result(None)
        for remote in self.source.files():
            if not in_partition(remote.path, self.options.index, self.options.count):
                continue
            if self.options.only and not any(fnmatch(remote.path, pattern) for pattern in self.options.only):
                continue
            facts["files"] += 1
            yield nothing if (remote.path, remote.identity) in done else pool.submit(self._one, remote)

    def _one(self, remote: Remote) -> Outcome:
        uri, path, identity = storage.join(self.raw, remote.path), remote.path, remote.identity
        try:
            size, digest = fetch_file(self.source, remote, uri, self.spool, self.options.policy, self.throttle)
            outcome = Outcome(path=path, identity=identity, status=DONE, size=size, sha256=digest)
        except FetchError as error:
            self.is_outage &= error.is_outage
            outcome = Outcome(path=path, identity=identity, status=FAILED, reason=str(error))
        self.ledger.add(outcome)
        return outcome


def verify_download(raw: str, *, index: int = 0, count: int = 1, threads: int = 16) -> tuple[int, list[str]]:
    """Hashes every file that is done according to the ledger. Returns the number of intact files, and a line for each
    damaged one.

    Damaged files are recorded as failed, so that the next download fetches them again.
    """
    ledger, wrong, right = Ledger(raw, f"verify-{index + 1}of{count}"), [], 0
    total = sum(1 for _ in _downloaded(raw, index, count))
    with ThreadPoolExecutor(threads) as pool:
        checks = (pool.submit(_fault, raw, row) for row in _downloaded(raw, index, count))
        done = (future.result() for future in in_order(checks, 4 * threads))
        for row, fault in progress(done, total=total, desc=f"verifying {raw}", unit="file"):
            right += not fault
            if fault:
                ledger.add(Outcome(path=row.path, identity=row.identity, status=FAILED, reason=fault))
                wrong.append(f"{row.path}: {fault}")
    ledger.close()
    return right, wrong


def _downloaded(raw: str, index: int, count: int) -> Iterator[Outcome]:
    return (row for row in outcomes(raw) if row.status == DONE and in_partition(row.path, index, count))


def _fault(raw: str, row: Outcome) -> tuple[Outcome, str]:
    state = hashlib.sha256()
    try:
        for chunk in storage.chunks(storage.join(raw, row.path)):
            state.update(chunk)
    except NotFoundError:
        return row, "missing: the file no longer exists"
    found = state.hexdigest()
    return row, "" if found == row.sha256 else f"sha256: must be {row.sha256}, got {found}"


@contextmanager
def _locked(spool: Path) -> Iterator[None]:
    """Locks the partition: two processes with the same one would write to the same files."""
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is downloading this partition ({spool}); wait for it.") from error
        yield


def _spool(raw: str) -> Path:
    """Folder for partial downloads of large files: inside the dataset, or in the cache if that is a bucket."""
    if storage.is_s3(raw):
        return cache_folder() / "downloads" / hashlib.sha256(raw.encode()).hexdigest()[:16]
    return Path(raw) / LEDGER / "arriving"
