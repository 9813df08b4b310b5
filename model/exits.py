"""Exit codes: 1-127 are permanent, 128 and above are worth a restart. User errors are lines, never tracebacks."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.config import ConfigError, ConversionError, TrackingError
from model.data.annotations import DataError
from model.storage import NotFoundError, StorageError

FAILED, CONFIGURATION, DATA, ATTEMPTS, INTERRUPTED, OUTAGE, LOST = 1, 2, 3, 4, 130, 134, 144
"""OUTAGE: a bucket or a server that does not answer may be back after a restart. LOST: a process of the run is gone or
stands still. ATTEMPTS: restarting has not helped. (143, asked to end and saved, is model.tracking's TERMINATED.)"""
FAILURES = "MPLUG_FAILURES"
"""Variable with the file in which a step of a pipeline notes its code and message: kfp's local runner drops both."""


TERMINATION_LOG = Path(os.environ.get("MPLUG_TERMINATION_LOG", "/dev/termination-log"))
"""A pod's terminationMessagePath: what a container leaves there is its reason in Kubernetes and Argo."""


class StageError(RuntimeError):
    """Something that this program started has failed; its own log says why."""


class ProcessFailedError(StageError):
    """A process that this program depends on has ended with `code`."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class OutageError(RuntimeError):
    """Something outside does not answer, and may be back after a restart."""


class AttemptsError(RuntimeError):
    """A run was started too often without getting any further."""


class LostProcessError(RuntimeError):
    """Another process of the run, or a loader process, is gone."""


CODES: dict[type[BaseException], int] = {
    ConfigError: CONFIGURATION,
    DataError: DATA,
    ConversionError: DATA,
    AttemptsError: ATTEMPTS,
    StageError: FAILED,
    NotFoundError: DATA,
    OutageError: OUTAGE,
    StorageError: OUTAGE,
    TrackingError: OUTAGE,
    LostProcessError: LOST,
    KeyboardInterrupt: INTERRUPTED,
}


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, SystemExit | ProcessFailedError):
        return error.code if isinstance(error.code, int) else FAILED
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), FAILED)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns the errors above into lines and exit codes; any other is a bug and keeps its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for noisy in ("botocore", "mlflow", "alembic", "deepspeed", "fontTools", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each try of MLflow's client; ours say once what is away
    try:
        yield
    except tuple(CODES) as error:
        code = code_of(error)
        # every process of a run reads the same configuration
        if code != INTERRUPTED and (code != CONFIGURATION or os.environ.get("RANK", "0") == "0"):
            report(code, str(error))
        sys.exit(code)
    except Exception as error:
        _note(FAILED, f"{type(error).__name__}: {error}")
        raise


def report(code: int, message: str) -> None:
    """Prints a user error in lines, and notes it."""
    _note(code, message)
    print(*(f"error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr, flush=True)


def _note(code: int, message: str) -> None:
    if where := os.environ.get(FAILURES):
        with open(where, "a", encoding="utf-8") as file:
            file.write(json.dumps([code, message]) + "\n")
    note_termination(code, message)


def note_termination(code: int, message: str) -> None:
    if os.access(TERMINATION_LOG, os.W_OK):
        with TERMINATION_LOG.open("a", encoding="utf-8") as file:
            file.write(f"exit code {code}: {' '.join(message.split())[:1000]}\n")


def clear_termination() -> None:
    """Removes what earlier attempts in this container have left."""
    if os.access(TERMINATION_LOG, os.W_OK):
        TERMINATION_LOG.write_text("")
