"""Errors that cross from one process to another: kind, message and traceback arrive."""

import pickle
import traceback
from dataclasses import dataclass
from typing import NoReturn

from model.exits import ProcessFailedError, code_of


class _TracebackError(Exception):
    """Where an error was raised in the other process; the cause of that error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class RemoteError:
    """An error as a value that can be pickled. Pickled by itself, an exception loses its traceback, and one with other
    arguments than its message cannot be unpickled."""

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "RemoteError":
        text = "".join(traceback.format_exception(error))
        if not _survives(error):
            error = ProcessFailedError(f"{type(error).__name__}: {error}", code_of(error))
        return cls(error, text)

    def reraise(self) -> NoReturn:
        raise self.error from _TracebackError(self.traceback)


def _survives(error: Exception) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its constructor makes of the arguments
        return False
    return type(copy) is type(error) and str(copy) == str(error)
