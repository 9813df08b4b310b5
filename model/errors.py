"""Every error that a user can act on, with its exit code, and how a process reports it. Imports nothing of the project.

Exit codes 1 to 127 are permanent: the same command fails again. From 128 on a restart may help. A user error is printed
as one line per problem; anything else is a bug and keeps its traceback.
"""

import json
import logging
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

FAILED, CONFIGURATION, DATA, ATTEMPTS = 1, 2, 3, 4
"""Permanent. ATTEMPTS: the run was restarted too often without progress."""
INTERRUPTED, OUTAGE, TERMINATED, LOST = 130, 134, 143, 144
"""Transient. INTERRUPTED: by Ctrl-C. OUTAGE: storage or a server does not answer. TERMINATED: by SIGTERM, after a
checkpoint. LOST: a process of the run is gone or hangs."""
FAILURES = "MPLUG_FAILURES"
"""Variable with the file to which a step of a pipeline writes its code and message: kfp's local runner drops both."""
TERMINATION_LOG = Path(os.environ.get("MPLUG_TERMINATION_LOG", "/dev/termination-log"))
"""A pod's terminationMessagePath: Kubernetes and Argo show its content as the reason why a container ended."""


class UserError(Exception):
    """Base of all errors that are reported as one line per problem, without a traceback."""

    exit_code = FAILED


class ConfigError(UserError, ValueError):
    """The configuration cannot be used; one line per problem."""

    exit_code = CONFIGURATION


class DataError(UserError, ValueError):
    """The data cannot be used as they are."""

    exit_code = DATA


class ConversionError(UserError, ValueError):
    """Published weights cannot be converted as they are."""

    exit_code = DATA


class StorageError(UserError, OSError):
    """The storage cannot be read or written."""

    exit_code = OUTAGE


class NotFoundError(StorageError):
    """The object does not exist."""

    exit_code = DATA


class TrackingError(UserError, OSError):
    """MLflow cannot be used."""

    exit_code = OUTAGE


class OutageError(UserError, RuntimeError):
    """A service does not answer."""

    exit_code = OUTAGE


class LostProcessError(UserError, RuntimeError):
    """Another process of the run, or a loader process, is gone."""

    exit_code = LOST


class AttemptsError(UserError, RuntimeError):
    """A run was restarted too often without progress."""

    exit_code = ATTEMPTS


class JobAbandonedError(AttemptsError):
    """A job on a cluster was stopped: it was restarted too often, or has exceeded its deadline."""


class StageError(UserError, RuntimeError):
    """Something that this program started has failed; its own log has the reason."""


class ClusterError(StageError):
    """The API server of Kubernetes has refused a request, with HTTP status `status`."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ProcessFailedError(StageError):
    """A process that this program depends on has ended with `exit_code`."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class JobFailedError(ProcessFailedError):
    """A job on a cluster has ended without success."""


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED


@contextmanager
def exit_codes() -> Iterator[None]:
    """Reports user errors in lines and exits with their code; any other error is raised as it is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for noisy in ("botocore", "mlflow", "alembic", "deepspeed", "fontTools", "httpx2", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # MLflow's client logs every retry
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        code = exit_code(error)
        # every process of a run reads the same configuration
        if code != INTERRUPTED and (code != CONFIGURATION or os.environ.get("RANK", "0") == "0"):
            report_error(code, str(error))
        sys.exit(code)
    except Exception as error:
        _record(FAILED, f"{type(error).__name__}: {error}")
        raise


def report_error(code: int, message: str) -> None:
    """Prints a user error in lines, and records it for the pipeline and for Kubernetes."""
    _record(code, message)
    print(*(f"error: {line}" for line in message.splitlines()), sep="\n", file=sys.stderr, flush=True)


def _record(code: int, message: str) -> None:
    if path := os.environ.get(FAILURES):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([code, message]) + "\n")
    note_termination(code, message)


def note_termination(code: int, message: str) -> None:
    """Adds a line to the container's termination log."""
    if os.access(TERMINATION_LOG, os.W_OK):
        with TERMINATION_LOG.open("a", encoding="utf-8") as file:
            file.write(f"exit code {code}: {' '.join(message.split())[:1000]}\n")


def clear_termination() -> None:
    """Removes what earlier attempts in this container have written."""
    if os.access(TERMINATION_LOG, os.W_OK):
        TERMINATION_LOG.write_text("")


class _TracebackError(Exception):
    """The traceback of an error in another process, attached as its cause when it is raised again here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class RemoteError:
    """An error on its way to another process, with its traceback.

    A pickled exception loses its traceback, and one whose arguments are not its message cannot be unpickled.
    """

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "RemoteError":
        text = "".join(traceback.format_exception(error))
        if not _can_be_pickled(error):
            error = ProcessFailedError(f"{type(error).__name__}: {error}", exit_code(error))
        return cls(error, text)

    def reraise(self) -> NoReturn:
        raise self.error from _TracebackError(self.traceback)


def _can_be_pickled(error: Exception) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # constructors may raise anything
        return False
    return type(copy) is type(error) and str(copy) == str(error)
