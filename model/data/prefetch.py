"""Work that is begun ahead of time and taken in order."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_order(futures: Iterable["Future[T]"], ahead: int) -> Iterator["Future[T]"]:
    """Passes futures on in their order, each when `ahead` more have been begun."""
    begun: deque[Future[T]] = deque()
    for future in futures:
        begun.append(future)
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun
