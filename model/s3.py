"""S3 clients of boto3 and obstore, with the same endpoint and credentials: one per process, profile and bucket.

A client is thread-safe. Creating one is not, because a boto3 session is not.
"""

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.session import Session
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Place:
    profile: str
    bucket: str
    key: str


def parse_uri(uri: str) -> Place:
    host, _, key = uri.removeprefix("s3://").partition("/")
    profile, _, bucket = host.rpartition("@")
    return Place(profile, bucket, key)


def object_key(uri: str) -> str:
    return parse_uri(uri).key


os.environ.setdefault("TOKIO_WORKER_THREADS", "4")
"""I/O threads of obstore. Its default is one per core, in each of the 200 loader processes of a node, which exceeds the
thread limit of a pod on many clusters."""
_creating = threading.RLock()


def _renew_lock() -> None:
    global _creating
    _creating = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)  # the thread that held it is not in the child


def get_client(profile: str) -> "S3Client":
    with _creating:
        return _client(os.getpid(), profile)


@lru_cache(maxsize=8)
def _client(_pid: int, profile: str) -> "S3Client":
    # keyed by process: a client inherited through a fork shares its sockets with the parent
    return boto3.Session(botocore_session=_session(profile)).client(
        "s3",
        # boto3 prefers the endpoint of the environment to that of the profile, and would send both to one S3
        endpoint_url=_session(profile).get_scoped_config().get("endpoint_url") if profile else None,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 8},
            max_pool_connections=32,
            connect_timeout=5,
            read_timeout=60,
            s3={"addressing_style": "path"},  # virtual-hosted style needs wildcard DNS
        ),
    )


def get_store(uri: str) -> S3Store:
    place = parse_uri(uri)
    with _creating:
        return _store(os.getpid(), place.profile, place.bucket)


@lru_cache(maxsize=8)
def _store(_pid: int, profile: str, bucket: str) -> S3Store:
    """Has the endpoint, region and credentials of the boto3 client, which also refreshes them."""
    meta = get_client(profile).meta
    return S3Store(
        bucket,
        aws_endpoint_url_s3=meta.endpoint_url,  # the environment overrides `endpoint`
        region=meta.region_name,
        virtual_hosted_style_request=False,
        credential_provider=Boto3CredentialProvider(_session(profile)),
        client_options={"allow_http": meta.endpoint_url.startswith("http://"), "timeout": "60s"},
        retry_config={"max_retries": 12, "retry_timeout": timedelta(seconds=90)},
    )


@lru_cache(maxsize=8)
def _session(profile: str) -> Session:
    return Session(profile=profile or None)
