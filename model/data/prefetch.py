"""Runs work ahead of time and returns the results in order."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_order(futures: Iterable["Future[T]"], ahead: int) -> Iterator["Future[T]"]:
    """Yields futures in order, each after `ahead` later ones were submitted."""
    begun: deque[Future[T]] = deque()
    for future in futures:
        begun.append(future)
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun
