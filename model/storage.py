"""One API for s3:// URIs and local paths. Only this file and model/s3.py, which holds the clients, import boto3 and
obstore.

Credentials, endpoint and region come from boto3's default chain (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, roles, …), so
the same code runs on a laptop, in a pod and against any S3. s3://PROFILE@bucket/key reads them from that profile of the
AWS configuration, which allows a second S3. boto3 lists, copies and removes objects. obstore transfers bytes: one of
its requests takes 0.3 ms of CPU time, one of boto3's 1.3 ms.
"""

import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import boto3
import obstore
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import AlreadyExistsError, BaseError

from model.errors import NotFoundError, StorageError
from model.s3 import get_client, get_store, object_key, parse_uri

P = ParamSpec("P")
R = TypeVar("R")
PARTIAL = ".partial"
PART_BYTES, PARTS_AT_ONCE = 64 * 2**20, 4
"""Part size of a multipart upload, and parts in flight. Their product is what an upload holds in memory."""
LARGE_UPLOADS = threading.BoundedSemaphore(2)
"""Multipart uploads of this process. More than two at a time have less throughput."""
NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
"""Errors of a path that cannot name a file."""


@dataclass(frozen=True)
class Entry:
    """One object."""

    path: str
    """Relative to the listed prefix, or the requested URI."""
    size: int
    version: str
    """Changes with the content: the ETag of an object, the modification time of a file."""


def join(root: str, *parts: str) -> str:
    """root/part/part, for URIs and paths alike."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def is_s3(uri: str) -> bool:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "s3":
        raise StorageError(f"{uri}: scheme {scheme}:// is not supported. Use s3://bucket/prefix or a local path.")
    return bool(separator)


def _one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Converts exceptions of the libraries and the system into a StorageError that names the URI."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (BotoCoreError, ClientError, boto3.exceptions.Boto3Error, BaseError) as error:
            uri = next((str(arg) for arg in args if str(arg).startswith("s3://")), "storage")
            kind = NotFoundError if _is_missing(error) else StorageError
            raise kind(f"{uri}: {' '.join(str(error).split())[:400]}") from error
        except FileNotFoundError as error:  # also raised by obstore, without a file name
            raise NotFoundError(f"{error.filename or args[0]} does not exist.") from error
        except StorageError:
            raise
        except OSError as error:
            kind = NotFoundError if error.errno in NO_FILE else StorageError
            raise kind(f"{error.filename or args[0]}: {error.strerror}.") from error

    return call


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in {"404", "NoSuchKey"}


@_one_line
def read(uri: str) -> bytes:
    if not is_s3(uri):
        return Path(uri).read_bytes()
    return bytes(obstore.get(get_store(uri), object_key(uri)).bytes())


@_one_line
def read_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`; fewer if the object ends before."""
    if not is_s3(uri):
        with open(uri, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)
    return bytes(obstore.get_range(get_store(uri), object_key(uri), start=start, length=length))


def read_pieces(uri: str, start: int, length: int, piece: int) -> Iterator[bytes]:
    """`length` bytes from `start`, in requests of at most `piece` bytes."""
    for at in range(start, start + length, piece):
        yield read_range(uri, at, min(piece, start + length - at))


def chunks(uri: str, size: int = 8 * 2**20) -> Iterator[bytes]:
    """The content of an object in chunks of `size` bytes."""
    entry = head(uri)
    if entry is None:
        raise NotFoundError(f"{uri} does not exist.")
    yield from read_pieces(uri, 0, entry.size, size)


class RandomAccess(io.RawIOBase):
    """An object as a seekable file. Every read is a request, so it does not suit many small reads."""

    def __init__(self, uri: str) -> None:
        entry = head(uri)
        if entry is None:
            raise NotFoundError(f"{uri} does not exist.")
        self.uri, self.size, self.position = uri, entry.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self.size - self.position)
        data = read_range(self.uri, self.position, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@_one_line
def open_text(uri: str, encoding: str = "utf-8") -> io.TextIOBase:
    """Opens a large text for streaming. Line ends are not converted."""
    if is_s3(uri):
        return io.TextIOWrapper(io.BufferedReader(RandomAccess(uri), 2**22), encoding=encoding, newline="")
    return open(uri, encoding=encoding, newline="")


@_one_line
def write(uri: str, data: bytes | memoryview) -> None:
    """Writes all of `data` or nothing: a reader never sees a partial object."""
    if is_s3(uri):
        obstore.put(get_store(uri), object_key(uri), data)
        return
    partial = _partial(Path(uri))
    try:
        partial.write_bytes(data)
        partial.replace(uri)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@_one_line
def create(uri: str, data: bytes) -> bool:
    """Writes a new object; False if there is one already. Of several writers at once, one succeeds."""
    try:
        if is_s3(uri):
            obstore.put(get_store(uri), object_key(uri), data, mode="create")
            return True
        partial = _partial(Path(uri))
        partial.write_bytes(data)
        try:
            os.link(partial, uri)
        finally:
            partial.unlink()
    except (AlreadyExistsError, FileExistsError):
        return False
    return True


@_one_line
def upload_file(path: Path, uri: str) -> None:
    """Copies a local file to `uri`, which becomes visible when it is complete."""
    if is_s3(uri):
        with LARGE_UPLOADS if path.stat().st_size > PART_BYTES // 8 else nullcontext():
            obstore.put(get_store(uri), object_key(uri), path, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        return
    partial = _partial(Path(uri))
    shutil.copyfile(path, partial)
    partial.replace(uri)


@_one_line
def move_in(path: Path, uri: str) -> None:
    """Moves a local file to `uri`: by rename if possible, otherwise by upload and removal."""
    if not is_s3(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # another file system
            path.replace(uri)
            return
    upload_file(path, uri)
    path.unlink()


@_one_line
def download_file(uri: str, path: Path) -> None:
    """Downloads one object; `path` becomes visible when it is complete."""
    partial = _partial(path)
    if is_s3(uri):
        with partial.open("wb") as file:
            for chunk in obstore.get(get_store(uri), object_key(uri)).stream(min_chunk_size=2**20):
                file.write(chunk)
    else:
        shutil.copyfile(uri, partial)
    partial.replace(path)


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")


@_one_line
def head(uri: str) -> Entry | None:
    """Size and version of one object; None if it does not exist."""
    if not is_s3(uri):
        if not Path(uri).is_file():
            return None
        stat = os.stat(uri)
        return Entry(uri, stat.st_size, str(stat.st_mtime_ns))
    place = parse_uri(uri)
    try:
        found = get_client(place.profile).head_object(Bucket=place.bucket, Key=place.key)
    except ClientError as error:
        if _is_missing(error):
            return None
        raise
    return Entry(uri, found["ContentLength"], found["ETag"].strip('"'))


@_one_line
def clock_skew_s(uri: str) -> float:
    """Seconds by which the clock of the store is ahead of this machine's. S3 refuses requests from a skewed clock."""
    if not is_s3(uri):
        return 0.0
    place = parse_uri(uri)
    answer = get_client(place.profile).head_object(Bucket=place.bucket, Key=place.key)
    told = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return told.timestamp() - time.time()


def exists(uri: str) -> bool:
    """Whether the object, or the local file or folder, exists."""
    return Path(uri).exists() if not is_s3(uri) else head(uri) is not None


def walk(uri: str) -> Iterator[Entry]:
    """All objects below `uri` in a fixed order; none if nothing exists there."""
    if is_s3(uri):
        yield from _walk_s3(uri)
    elif Path(uri).is_dir():
        yield from _walk_folder(uri, "")


def _walk_folder(folder: str, prefix: str) -> Iterator[Entry]:
    """One folder at a time, so that ten million files are never listed at once."""
    with os.scandir(folder) as items:
        found = sorted(items, key=lambda item: item.name)
    for item in found:
        if item.name.startswith(".") and item.name.endswith(PARTIAL):
            continue  # of a writer that was killed
        if item.is_dir():
            yield from _walk_folder(item.path, f"{prefix}{item.name}/")
        elif item.is_file():
            stat = item.stat()
            yield Entry(prefix + item.name, stat.st_size, str(stat.st_mtime_ns))


def _walk_s3(uri: str) -> Iterator[Entry]:
    place = parse_uri(uri)
    prefix = f"{place.key.rstrip('/')}/" if place.key else ""
    pages = get_client(place.profile).get_paginator("list_objects_v2")
    try:
        for page in pages.paginate(Bucket=place.bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                yield Entry(item["Key"].removeprefix(prefix), item["Size"], item["ETag"].strip('"'))
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from error


@_one_line
def move(source: str, dest: str) -> None:
    """Renames an object within one root. Does nothing if only `dest` exists."""
    if head(source) is None and head(dest) is not None:
        return
    if not is_s3(source):
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        Path(source).replace(dest)
        return
    old, new = parse_uri(source), parse_uri(dest)
    client = get_client(old.profile)
    # a copy inside the store: the bytes do not pass through this process
    client.copy_object(Bucket=new.bucket, Key=new.key, CopySource={"Bucket": old.bucket, "Key": old.key})
    client.delete_object(Bucket=old.bucket, Key=old.key)


@_one_line
def remove(uri: str) -> None:
    """Removes everything below `uri`."""
    if not is_s3(uri):
        shutil.rmtree(uri, ignore_errors=True)
        return
    place = parse_uri(uri)
    keys = [f"{place.key.rstrip('/')}/{entry.path}" for entry in walk(uri)]
    for start in range(0, len(keys), 1000):  # S3's limit
        batch = [{"Key": name} for name in keys[start : start + 1000]]
        get_client(place.profile).delete_objects(Bucket=place.bucket, Delete={"Objects": batch, "Quiet": True})  # type: ignore[typeddict-item]
