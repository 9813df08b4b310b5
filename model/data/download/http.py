"""Resumable GET requests that verify the response headers. The only file of `model` that imports urllib3."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3

from model.errors import DataError
from model.retry import exponential_s, retry

CHUNK = 2**20
CONNECT_S, READ_S = 10.0, 60.0
ATTEMPTS = 5
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
pool = urllib3.PoolManager(
    num_pools=16,
    maxsize=64,
    timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S),
    retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False),
    headers={"User-Agent": "mplug-video", "Accept-Encoding": "identity"},
)
NO_ANSWER = {"timeout", "connection", "storage", *(f"http_{status}" for status in TRANSIENT)}
"""Failure reasons of an outage."""


class FetchError(OSError):
    """A file was not received. `reason` is a short code for statistics."""

    def __init__(self, reason: str, detail: str, *, transient: bool, wait_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}"[:300])
        self.reason, self.transient, self.wait_s = reason, transient, wait_s
        self.is_outage = transient and reason in NO_ANSWER
        """Whether the file may become available once the source is back."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """The response of a source."""

    start: int
    """Offset of the first byte; 0 if the source ignored the requested offset."""
    size: int | None
    """Size of the whole file, if known."""
    validator: str
    """Identifies the version of the file. Empty: a broken transfer must start again."""
    chunks: Iterator[bytes]


def redact_url(url: str) -> str:
    """A URL without its secrets: query string (signatures), user and password."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def save(url: str, path: Path, headers: Mapping[str, str] | None = None) -> None:
    """Downloads a small file to `path`. Raises DataError."""

    def transfer() -> None:
        with path.open("wb") as file:
            for chunk in get(url, headers=headers).chunks:
                file.write(chunk)

    def wait_s(error: Exception, failures: int) -> float:
        if not isinstance(error, FetchError):
            raise error
        if not error.transient or failures == ATTEMPTS:
            raise DataError(f"{redact_url(url)} cannot be read: {error}") from error
        return max(error.wait_s, exponential_s(failures, 0.5, 60.0))

    retry(transfer, wait_s)


def get(url: str, *, start: int = 0, validator: str = "", headers: Mapping[str, str] | None = None) -> Body:
    """The file from `start`, or from 0 if it has changed or the server does not support ranges. Raises FetchError."""
    wanted = dict(headers or {})
    if start:
        wanted |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = pool.request("GET", url, headers={**pool.headers, **wanted}, preload_content=False)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _broken(error) from error
    try:
        return _checked(response, start, validator)
    except FetchError:
        response.close()
        raise


def _checked(response: urllib3.response.BaseHTTPResponse, start: int, validator: str) -> Body:
    status, found = response.status, _validator(response.headers)
    if status == 206 and start:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != start or (found and found != validator):
            raise FetchError("changed", "the server sent another range than requested", transient=True)
        size = None if span[3] == "*" else int(span[3])
        return Body(start=start, size=size, validator=validator, chunks=_chunks(response))
    if status == 200:
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        return Body(start=0, size=size, validator=found, chunks=_chunks(response))
    if status == 416:
        raise FetchError("changed", "the file is shorter than the received bytes", transient=True)
    after = response.headers.get("Retry-After", "")
    wait_s = float(after) if after.isdigit() else 0.0
    raise FetchError(f"http_{status}", response.reason or "", transient=status in TRANSIENT, wait_s=min(wait_s, 120.0))


def _validator(headers: Mapping[str, str]) -> str:
    """A strong ETag or Last-Modified, which If-Range accepts."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _chunks(response: urllib3.response.BaseHTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read1(CHUNK):  # `read` would lose bytes received before a broken connection
            yield chunk
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _broken(error) from error
    finally:
        # a connection cannot be reused if the body was not read to its end
        response.release_conn() if response.closed else response.close()


def _broken(error: Exception) -> FetchError:
    cause = getattr(error, "reason", None) or error
    refused = isinstance(cause, urllib3.exceptions.NewConnectionError)  # a subclass of urllib3's timeout error
    timed_out = isinstance(cause, urllib3.exceptions.TimeoutError) and not refused
    # a query string may hold a signature, and this text is written to ledgers and logs
    detail = re.sub(r"\?\S*", "?…", " ".join(str(error).split()))
    return FetchError("timeout" if timed_out else "connection", detail, transient=True)
