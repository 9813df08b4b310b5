"""S3 clients keep the address and credentials of their creation."""

from collections.abc import Iterator
from contextlib import contextmanager

from model import s3


@contextmanager
def fresh_clients() -> Iterator[None]:
    """Clients created inside the block use the environment at that time."""
    caches = (s3._client, s3._store, s3._session)
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
