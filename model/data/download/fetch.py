"""Transfers one file from a source to storage: resumes after errors, verifies the content, limits the attempts."""

import hashlib
import json
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from model import storage
from model.data.download.http import FetchError
from model.data.download.sources import Remote, Source
from model.errors import NotFoundError, StorageError
from model.retry import exponential_s, retry

IN_MEMORY = 8 * 2**20
MAX_WAIT_S = 60.0


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of retries."""

    attempts: int = 6
    """Consecutive attempts without progress."""
    first_wait_s: float = 0.5
    """Doubled after every attempt, with jitter between 50 % and 100 %."""

    def wait_s(self, attempt: int) -> float:
        return exponential_s(attempt, self.first_wait_s, MAX_WAIT_S) * random.uniform(0.5, 1)


class Throttle:
    """Limits all threads together to `rate` bytes per second. 0: no limit."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free_at, self.lock = rate, time.monotonic(), threading.Lock()

    def take(self, size: int) -> None:
        if self.rate:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + size / self.rate
                wait_s = self.free_at - time.monotonic()
            time.sleep(max(0.0, wait_s))


class PartialDownload:
    """The received bytes of one file: in memory while they are few, otherwise in `path`, for a later process."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.note, self.identity = path, path.with_name(path.name + ".json"), identity
        self.hash, self.size, self.validator = hashlib.sha256(), 0, ""
        self.buffer = bytearray()
        self.file: IO[bytes] | None = None
        self.is_kept = self.path.exists() and self.note.exists()
        if self.is_kept:
            self._find()

    def _find(self) -> None:
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except ValueError:  # truncated by a kill
            return
        if note["identity"] == self.identity:
            self.validator, self.file = note["validator"], self.path.open("r+b")
            while chunk := self.file.read(2**20):
                self.hash.update(chunk)
                self.size += len(chunk)

    def restart(self, validator: str) -> None:
        """Forgets all bytes."""
        self.discard()
        self.hash, self.size, self.validator = hashlib.sha256(), 0, validator

    def write(self, chunk: bytes) -> None:
        self.hash.update(chunk)
        self.size += len(chunk)
        if self.file:
            self.file.write(chunk)
            return
        self.buffer += chunk
        if len(self.buffer) > IN_MEMORY:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.is_kept, self.file = True, self.path.open("wb")
            self.note.write_text(json.dumps({"identity": self.identity, "validator": self.validator}), encoding="utf-8")
            self.file.write(self.buffer)
            self.buffer = bytearray()

    def deliver(self, uri: str) -> None:
        """Moves the complete file to its destination."""
        if self.file:
            self.file.close()
            storage.move_in(self.path, uri)
        else:
            storage.write(uri, bytes(self.buffer))
        self.discard()

    def discard(self) -> None:
        self.close()
        self.file, self.buffer = None, bytearray()
        if self.is_kept:
            self.path.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)
            self.is_kept = False

    def close(self) -> None:
        """Leaves what has arrived for a later process."""
        if self.file:
            self.file.close()


def fetch_file(
    source: Source, remote: Remote, uri: str, spool: Path, policy: RetryPolicy, throttle: Throttle
) -> tuple[int, str]:
    """Copies one file to `uri` and returns its size and sha256. Raises FetchError, and leaves `uri` unchanged."""
    arrived = PartialDownload(spool / hashlib.sha256(remote.path.encode()).hexdigest()[:32], remote.identity)
    attempts, most = 0, arrived.size

    def transfer() -> None:
        _transfer(source, remote, arrived, throttle)
        _check(remote, arrived)

    def wait_for_source_s(error: Exception, _failures: int) -> float:
        nonlocal attempts, most
        attempts = attempts + 1 if arrived.size <= most else 1
        most = max(most, arrived.size)
        if isinstance(error, FetchError) and error.transient and attempts < policy.attempts:
            return max(policy.wait_s(attempts), error.wait_s)
        if isinstance(error, FetchError):
            arrived.close()
        raise error

    def wait_for_storage_s(error: Exception, failures: int) -> float:
        if isinstance(error, NotFoundError):  # a name that is not valid at the destination
            arrived.discard()
            raise FetchError("name", str(error), transient=False) from error
        # an outage of the storage is not an error of this file
        if not isinstance(error, StorageError) or failures == policy.attempts:
            raise error
        return policy.wait_s(failures)

    retry(transfer, wait_for_source_s)
    retry(lambda: arrived.deliver(uri), wait_for_storage_s)
    return arrived.size, arrived.hash.hexdigest()


def _transfer(source: Source, remote: Remote, arrived: PartialDownload, throttle: Throttle) -> None:
    # without a validator it is unknown whether the rest belongs to the received bytes
    start = arrived.size if arrived.validator else 0
    try:
        body = source.open(remote, start, arrived.validator)
    except FetchError as error:
        if error.reason == "changed":
            arrived.restart("")
        raise
    if body.start == 0 or body.start != arrived.size:
        arrived.restart(body.validator)
    for chunk in body.chunks:
        throttle.take(len(chunk))
        arrived.write(chunk)
    if body.size is not None and arrived.size != body.size:
        detail = f"{body.size} bytes were announced, {arrived.size} received"
        if arrived.size > body.size:
            arrived.restart("")
        raise FetchError("truncated", detail, transient=True)


def _check(remote: Remote, arrived: PartialDownload) -> None:
    found = arrived.hash.hexdigest()
    if remote.size is not None and arrived.size != remote.size:
        fault = "size", f"{remote.size} bytes are listed, {arrived.size} received"
    elif remote.sha256 and found != remote.sha256:
        fault = "sha256", f"sha256 {remote.sha256} is listed, got {found}"
    else:
        return
    arrived.restart("")
    raise FetchError(*fault, transient=True)
