"""Progress of long work: a bar on a terminal, a line every quarter of a minute in a log."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_EVERY_S = 15.0


def progress(
    items: Iterable[T] | None = None, *, total: int | None, desc: str, unit: str, show: bool = True, initial: int = 0
) -> "tqdm[T]":
    """Passes `items` on and shows how far they are, how fast, and when they will be through.

    Without `items`, as a context whose `update` says what is done.
    """
    interval_s = 0.5 if sys.stderr.isatty() else LOG_EVERY_S
    bar: tqdm[T] = tqdm(
        items, total=total, desc=desc, unit=unit, disable=not show, initial=initial,
        mininterval=interval_s, maxinterval=interval_s, miniters=0,
    )  # type: ignore[assignment] # fmt: skip
    return bar
