"""Progress of long work: a bar on a terminal, a line at most every ten seconds elsewhere."""

import io
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 10.0


class Lines(io.StringIO):
    """Standard error, on which each state of a bar is a line: a container's log is read line by line, and a carriage
    return ends none."""

    def write(self, text: str) -> int:
        if line := text.strip():
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        return len(text)


def progress(
    items: Iterable[T] | None = None, *, total: int | None, desc: str, unit: str, show: bool = True, initial: int = 0
) -> "tqdm[T]":
    """Passes `items` on and shows how far they are, how fast, and when they will be through.

    Without `items`, as a context whose `update` says what is done.
    """
    is_terminal = sys.stderr.isatty()
    interval_s = 0.5 if is_terminal else LINE_EVERY_S
    bar: tqdm[T] = tqdm(
        items, total=total, desc=desc, unit=unit, disable=not show, initial=initial,
        file=sys.stderr if is_terminal else Lines(), mininterval=interval_s, maxinterval=interval_s, miniters=0,
    )  # type: ignore[assignment] # fmt: skip
    return bar
