"""Progress of long work: a bar on a terminal, otherwise at most one line every ten seconds."""

import io
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY_S = 10.0


class Lines(io.StringIO):
    """Writes each update of a bar to standard error as a line: container logs are line-based and ignore carriage
    returns."""

    def write(self, text: str) -> int:
        if line := text.strip():
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        return len(text)


def progress(
    items: Iterable[T] | None = None, *, total: int | None, desc: str, unit: str, show: bool = True, initial: int = 0
) -> "tqdm[T]":
    """Yields `items` and shows count, rate and remaining time. Without `items`, call `update` on the returned bar."""
    is_terminal = sys.stderr.isatty()
    interval_s = 0.5 if is_terminal else LINE_EVERY_S
    return tqdm(
        items,
        total=total,
        desc=desc,
        unit=unit,
        disable=not show,
        initial=initial,
        file=sys.stderr if is_terminal else Lines(),
        mininterval=interval_s,
        maxinterval=interval_s,
        miniters=0,
    )  # type: ignore[return-value]
