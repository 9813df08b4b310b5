"""The start of a process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports without garbage collection, and keeps what they have created out of all later collections.

    Modules stay until the process ends. Looking for garbage among them takes a fifth of the time of a training
    process's imports: 6.5 s with it, 5.2 s without.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
