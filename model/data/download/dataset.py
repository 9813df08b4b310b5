"""Brings a published dataset to <root>/raw/<dataset>: `mplug data download SOURCE ROOT`.

Each file appears there whole or not at all; the ledger beside them says which are done and why others are not. The same
command goes on where it was interrupted, tries failed files again and fetches what has changed. Many machines share the
work by partitions: a file's path alone says whose it is.
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
"""Files that are listed before the first is waited for: what the remaining time is estimated from."""
SHOWN = 5
LISTS = {".csv", ".tsv", ".jsonl", ".txt"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to fetch, and how."""

    only: Sequence[str] = ()
    """Patterns of paths; empty: everything."""
    index: int = 0
    count: int = 1
    """This process fetches share `index` of `count`."""
    threads: int = 32
    rate: float = 0.0
    """Bytes per second; 0: as fast as it goes."""
    max_failed: float = 0.0
    """Share of files that may fail without an error."""
    policy: RetryPolicy = field(default_factory=RetryPolicy)


def in_share(path: str, index: int, count: int) -> bool:
    """Whether a file belongs to share `index` of `count`; its path alone says."""
    return zlib.crc32(path.encode()) % count == index


def open_source(source: str) -> Source:
    """The kind of a source is in its name."""
    if source.startswith(SCHEME):
        return ModelScopeSource(source.removeprefix(SCHEME))
    suffix = PurePosixPath(source.partition("?")[0]).suffix
    if is_http(source) or (suffix in LISTS and Path(source).is_file()):
        return ManifestSource(source)
    return StorageSource(source)


def download_dataset(
    source: str | Source, root: str, dataset: str = "youku-mplug", options: Options | None = None
) -> tuple[str, dict[str, float]]:
    """Copies a source to <root>/raw/<dataset>; returns that URI and what was done.

    Raises DataError where files could not be had, OutageError where only because the source does not answer; all
    others are there.
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
    with _alone(job.spool), ThreadPoolExecutor(options.threads) as pool, bar:
        try:
            for future in in_order(job.begin(pool, facts), LISTED_AHEAD):
                outcome = future.result()
                bar.total = int(facts["files"])
                if outcome is None:
                    bar.update()
                    continue
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
            f"{facts['files_failed']:.0f} of {facts['files']:.0f} files could not be fetched. The same command tries "
            f"them again, `mplug data status {raw}` counts the reasons, --max-failed goes on without them."
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
    """Whether nothing worse has happened so far."""

    def begin(self, pool: ThreadPoolExecutor, facts: dict[str, float]) -> Iterator["Future[Outcome | None]"]:
        """A future for each file of this share; None for one that is there already."""
        done = Done(self.raw)
        nothing: Future[Outcome | None] = Future()
        nothing.set_result(None)
        for remote in self.source.files():
            if not in_share(remote.path, self.options.index, self.options.count):
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
    """Reads every file that the ledger calls done; returns how many are right, and a line for each that is not.

    Those are marked as failed, so that the next download fetches them again.
    """
    ledger, wrong, right = Ledger(raw, f"verify-{index + 1}of{count}"), [], 0
    total = sum(1 for _ in _mine(raw, index, count))
    with ThreadPoolExecutor(threads) as pool:
        checks = (pool.submit(_fault, raw, row) for row in _mine(raw, index, count))
        done = (future.result() for future in in_order(checks, 4 * threads))
        for row, fault in progress(done, total=total, desc=f"verifying {raw}", unit="file"):
            right += not fault
            if fault:
                ledger.add(Outcome(path=row.path, identity=row.identity, status=FAILED, reason=fault))
                wrong.append(f"{row.path}: {fault}")
    ledger.close()
    return right, wrong


def _mine(raw: str, index: int, count: int) -> Iterator[Outcome]:
    return (row for row in outcomes(raw) if row.status == DONE and in_share(row.path, index, count))


def _fault(raw: str, row: Outcome) -> tuple[Outcome, str]:
    state = hashlib.sha256()
    try:
        for chunk in storage.chunks(storage.join(raw, row.path)):
            state.update(chunk)
    except NotFoundError:
        return row, "missing: the file is no longer there"
    found = state.hexdigest()
    return row, "" if found == row.sha256 else f"sha256: {row.sha256} was written, {found} is there"


@contextmanager
def _alone(spool: Path) -> Iterator[None]:
    """Two processes with the same share would write into each other's files."""
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process on this machine downloads this share ({spool}); wait for it.") from error
        yield


def _spool(raw: str) -> Path:
    """Where large files arrive: beside their place, or, where that is a bucket, in the cache."""
    if storage.is_s3(raw):
        return cache_folder() / "downloads" / hashlib.sha256(raw.encode()).hexdigest()[:16]
    return Path(raw) / LEDGER / "arriving"
