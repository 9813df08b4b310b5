"""Exit codes: 1-127 are permanent, 128 and above are worth a restart. User errors are lines, never tracebacks."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from model.config import ConfigError, ConversionError, TrackingError
from model.data.annotations import DataError
from model.storage import StorageError

FAILED, CONFIGURATION, DATA, INTERRUPTED, OUTAGE = 1, 2, 3, 130, 134
"""OUTAGE is above 127: a bucket or a server that does not answer may be back after a restart."""


class StageError(RuntimeError):
    """Something that this program started has failed; its own log says why."""


@contextmanager
def exit_codes() -> Iterator[None]:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    for noisy in ("botocore", "urllib3", "mlflow", "alembic", "deepspeed", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except ConfigError as error:
        _end(error, CONFIGURATION)
    except (DataError, ConversionError) as error:
        _end(error, DATA)
    except (StorageError, TrackingError) as error:
        _end(error, OUTAGE)
    except StageError as error:
        _end(error, FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _end(error: Exception, code: int) -> None:
    if os.environ.get("RANK", "0") == "0" or code != CONFIGURATION:  # every process of a run reads the same one
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr, flush=True)
    sys.exit(code)
