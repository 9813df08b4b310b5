"""One API for s3:// URIs and local paths. The only file that imports boto3.

Credentials, endpoint and region come from boto3's own chain (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3, roles, …), so the
same code runs on a laptop, in a pod and against any S3.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

P = ParamSpec("P")
R = TypeVar("R")


class StorageError(OSError):
    """The storage cannot be read or written. Transient for a training job: worth a restart."""


class NotFoundError(StorageError):
    """There is no such object. Asking again will not help."""


@dataclass(frozen=True)
class Entry:
    """One object below a prefix."""

    path: str
    """Relative to the prefix that was listed."""
    size: int


def join(root: str, *parts: str) -> str:
    """root/part/part, for URIs and paths alike."""
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def is_s3(uri: str) -> bool:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "s3":
        raise StorageError(f"{uri}: scheme {scheme}:// is not supported. Use s3://bucket/prefix or a local path.")
    return bool(separator)


def _one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Turns boto3's and the system's exceptions into a StorageError that names the URI."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (BotoCoreError, ClientError, boto3.exceptions.Boto3Error) as error:
            uri = next((str(arg) for arg in args if str(arg).startswith("s3://")), "storage")
            kind = NotFoundError if _is_missing(error) else StorageError
            raise kind(f"{uri}: {' '.join(str(error).split())}") from error
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename} does not exist.") from error

    return call


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in {"404", "NoSuchKey"}


@_one_line
def read(uri: str) -> bytes:
    if not is_s3(uri):
        return Path(uri).read_bytes()
    bucket, key = _split(uri)
    return _client().get_object(Bucket=bucket, Key=key)["Body"].read()


@_one_line
def write(uri: str, data: bytes) -> None:
    """Writes all of `data` or nothing: a reader never sees half an object."""
    if is_s3(uri):
        bucket, key = _split(uri)
        _client().put_object(Bucket=bucket, Key=key, Body=data)
        return
    path = Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


@_one_line
def upload(path: Path, uri: str) -> None:
    if is_s3(uri):
        bucket, key = _split(uri)
        _client().upload_file(str(path), bucket, key)
    else:
        write(uri, path.read_bytes())


@_one_line
def download(uri: str, path: Path) -> None:
    """Fetches one object; `path` appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if is_s3(uri):
        bucket, key = _split(uri)
        _client().download_file(bucket, key, str(partial))
    else:
        partial.write_bytes(Path(uri).read_bytes())
    partial.replace(path)


@_one_line
def exists(uri: str) -> bool:
    if not is_s3(uri):
        return Path(uri).exists()
    bucket, key = _split(uri)
    try:
        _client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _is_missing(error):
            return False
        raise
    return True


def walk(uri: str) -> Iterator[Entry]:
    """Every object below `uri`, sorted by path; none where nothing is there."""
    if is_s3(uri):
        yield from _walk_s3(uri)
        return
    root = Path(uri)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        yield Entry(path.relative_to(root).as_posix(), path.stat().st_size)


def _walk_s3(uri: str) -> Iterator[Entry]:
    bucket, key = _split(uri)
    prefix = f"{key.rstrip('/')}/" if key else ""
    try:
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                yield Entry(item["Key"].removeprefix(prefix), item["Size"])
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{uri}: {' '.join(str(error).split())}") from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _client() -> "S3Client":
    return _client_of(os.getpid())


@lru_cache(maxsize=1)
def _client_of(_pid: int) -> "S3Client":
    # one client per process: a client that crosses a fork shares its sockets with the parent
    return boto3.client(
        "s3",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=32,
            connect_timeout=5,
            read_timeout=60,
            s3={"addressing_style": "path"},  # a bucket in the host name needs wildcard DNS
        ),
    )
