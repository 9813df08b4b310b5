"""The checkpoint folder of a run, and its file run.json, which counts the starts and holds the result.

A cluster restarts a process that exits with 128 or above, without limit. `mplug train` counts each start before it
creates the training processes, so that the count survives a kill of them or of the pod. After `checkpoint.max_attempts`
starts without a new checkpoint it exits with a permanent code. This file imports no torch, to keep the counting process
small.
"""

import hashlib
import json
import re
import uuid
from dataclasses import asdict, dataclass, replace

from model import storage
from model.config.schema import CheckpointConfig, RunConfig, count_in_steps
from model.data.shards.reader import read_dataset_info
from model.errors import AttemptsError, NotFoundError

FILE = "run.json"
OLD_NAMES = {"fruitless": "restarts_without_progress", "is_told": "is_synced"}
"""Names of fields in a run.json of version 0.1.0."""
STEP = re.compile(r"step-(\d{8})/manifest\.json")
MACHINE_KEYS = {
    "data": {"workers", "read_ahead", "cache_gb", "decoder", "decode_deadline_s", "max_read_failures"},
    "training": {"zero_stage", "gradient_accumulation", "activation_checkpointing", "compile", "log_every", "profile"},
}
"""Settings that may differ between the starts of one run, because they do not change what is learned."""


def run_folder(config: RunConfig) -> str:
    """The checkpoint folder of a run. It depends on all settings that change what is learned."""
    sections = {"task", "seed", "trial", "model", "data", "optim", "training"}
    tree = config.model_dump(mode="json", include=sections, exclude=MACHINE_KEYS)
    tree["pipeline"] = config.tracking.pipeline  # every pipeline run trains anew
    if config.code_version:
        tree["code_version"] = config.code_version
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]
    return storage.join(config.output, "checkpoints", f"{config.name}-{digest}")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    key: str
    """Key of the run in MLflow, the same for every start."""
    number: int = 0
    """Starts so far."""
    restarts_without_progress: int = 0
    """Starts since the newest checkpoint."""
    step: int = 0
    """Step of the newest checkpoint at this start."""
    cause: str = ""
    """Known cause of a failure since the newest checkpoint."""
    model: str = ""
    """URI of the published model; empty while the run is not finished."""
    is_synced: bool = False
    """Whether MLflow has received everything of the finished run."""


def count_start(config: RunConfig, cause: str = "") -> None:
    """Counts a start of a run. Raises AttemptsError after too many starts without progress."""
    start_attempt(run_folder(_in_steps(config)), config.checkpoint, cause)


def start_attempt(folder: str, config: CheckpointConfig, cause: str = "") -> Attempt:
    """Counts a start and records the `cause` of the previous end. A finished run is not counted."""
    where = storage.join(folder, FILE)
    last = read_attempt(folder) if storage.exists(where) else Attempt(key=uuid.uuid4().hex)
    if last.model:
        return last
    step = next(iter(saved_steps(folder)), 0)
    known = (last.restarts_without_progress, last.cause) if step == last.step else (0, "")
    attempt = replace(
        last, number=last.number + 1, step=step, restarts_without_progress=known[0] + 1, cause=cause or known[1]
    )
    if attempt.restarts_without_progress > config.max_attempts:
        why = attempt.cause or "see their logs, or `kubectl describe pod` if the container was killed."
        raise AttemptsError(
            f"the run was started {last.restarts_without_progress} times without a checkpoint after step {step} (at "
            f"most checkpoint.max_attempts = {config.max_attempts}): {why} After fixing the cause, remove {where}."
        )
    _write(where, attempt)
    return attempt


def read_attempt(folder: str) -> Attempt:
    """The most recent start."""
    saved = json.loads(storage.read(storage.join(folder, FILE)))
    return Attempt(**{OLD_NAMES.get(key, key): value for key, value in saved.items()})


def published_model(config: RunConfig) -> str:
    """URI of the model that this run has published. Raises NotFoundError if it has not finished."""
    folder = run_folder(_in_steps(config))
    attempt = read_attempt(folder)
    if not attempt.model:
        raise NotFoundError(f"{folder}: the run has not published a model.")
    return attempt.model


def finish_attempt(folder: str, attempt: Attempt) -> None:
    """Records that the run is finished. If it is started again, it only prints the URI of its model."""
    _write(storage.join(folder, FILE), attempt)


def _in_steps(config: RunConfig) -> RunConfig:
    return count_in_steps(config, read_dataset_info(config.data.shards)["clips"]["train"])


def _write(where: str, attempt: Attempt) -> None:
    storage.write(where, json.dumps(asdict(attempt), indent=1).encode())


def saved_steps(folder: str) -> list[int]:
    """Steps of the checkpoints in the folder of a run, newest first."""
    found = (STEP.fullmatch(entry.path) for entry in storage.walk(folder))
    return sorted((int(match[1]) for match in found if match), reverse=True)
