"""How often a run was started, and how it ended: run.json beside its checkpoints.

A cluster restarts what ends with a code of 128 or more, for ever. A run that is started again and again without getting
any further ends itself, with a code that is not restarted.
"""

import json
import uuid
from dataclasses import asdict, dataclass, replace

from model import storage
from model.config import RunConfig, in_steps
from model.config_sections import CheckpointConfig
from model.data.shards import describe
from model.exits import AttemptsError
from model.storage import NotFoundError
from model.training.checkpoint import run_folder, saved_steps

FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    key: str
    """The run's name in MLflow, the same for every attempt."""
    number: int = 0
    """Starts so far."""
    fruitless: int = 0
    """Starts since the newest checkpoint."""
    step: int = 0
    """Step of the newest checkpoint when it started."""
    model: str = ""
    """URI of the published model; empty while the run is not finished."""
    is_told: bool = False
    """Whether MLflow has everything of the finished run."""


def begin(folder: str, config: CheckpointConfig) -> Attempt:
    """Counts a start. Raises AttemptsError where restarting has not helped."""
    where = storage.join(folder, FILE)
    last = Attempt(key=uuid.uuid4().hex)
    if storage.exists(where):
        last = Attempt(**json.loads(storage.read(where)))
    if last.model:
        return last
    step = next(iter(saved_steps(folder)), 0)
    attempt = replace(last, number=last.number + 1, step=step, fruitless=last.fruitless + 1 if step == last.step else 1)
    if attempt.fruitless > config.max_attempts:
        raise AttemptsError(
            f"the run was started {last.fruitless} times without a checkpoint after step {step} (at most "
            f"checkpoint.max_attempts = {config.max_attempts}). The log of those starts says why; once it is mended, "
            f"remove {where}."
        )
    _write(where, attempt)
    return attempt


def published(config: RunConfig) -> str:
    """URI of the model that this run has published. Raises NotFoundError where it has not finished."""
    folder = run_folder(in_steps(config, describe(config.data.shards)["clips"]["train"]))
    attempt = Attempt(**json.loads(storage.read(storage.join(folder, FILE))))
    if not attempt.model:
        raise NotFoundError(f"{folder}: the run has not published a model.")
    return attempt.model


def finish(folder: str, attempt: Attempt) -> None:
    """Notes that the run is finished: started again, it says its model and does not train."""
    _write(storage.join(folder, FILE), attempt)


def _write(where: str, attempt: Attempt) -> None:
    storage.write(where, json.dumps(asdict(attempt), indent=1).encode())
