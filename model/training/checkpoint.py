"""Writes checkpoints to storage and restores a run from them.

    <output>/checkpoints/<name>-<digest>/
        step-00001000/   state-00000-of-00008.safetensors …, history.jsonl, manifest.json
        run.json         number of starts, and the published model

Training only waits for a copy in memory, which a thread uploads. The manifest is written last: without it a checkpoint
does not exist. Frozen weights are not saved, only their hash.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from model import manifest, storage
from model.config.schema import CheckpointConfig
from model.distributed import Processes, as_lost_process
from model.errors import ConfigError, DataError, LostProcessError, NotFoundError, StorageError
from model.training.attempts import saved_steps
from model.training.engine import Engine
from model.training.snapshot import Snapshot

log = logging.getLogger("mplug")
HISTORY = "history.jsonl"


class DamagedCheckpointError(Exception):
    """A checkpoint does not match its manifest."""


class Checkpoints:
    """Saves and restores one run. All processes must call each method together."""

    def __init__(
        self, folder: str, config: CheckpointConfig, engine: Engine, base_sha256: str, group: Processes
    ) -> None:
        self.folder, self.config, self.engine, self.group = folder, config, engine, group
        self.base_sha256 = base_sha256
        self.snapshot: Snapshot | None = None
        self.upload: threading.Thread | None = None
        self.failure: Exception | None = None
        """Error in the upload thread other than a storage outage."""
        # a separate group for the upload threads, whose collectives must not mix with those of the training
        self.uploaders = dist.new_group(backend="gloo")
        self.best_step = -1
        """Step of the best checkpoint, which is always kept."""
        self.pending_step = -1
        """Step of the current checkpoint until it is complete; -1 otherwise. Only set on the first process."""
        self.read_history = b""

    def save(self, step: int, history: bytes, facts: Mapping[str, Any], best_step: int = -1) -> None:
        """Copies the state of this process and starts a thread that uploads it. Waits for the previous upload first.

        If a checkpoint cannot be written, a warning is logged and training continues.
        """
        self.wait()
        self.best_step, self.pending_step = best_step, step
        if self.group.is_main or self.engine.stage > 0:  # in stage 0 every process has the same state
            tensors = self.engine.state.tensors()
            if self.snapshot is None:
                self.snapshot = Snapshot(tensors)
            self.snapshot.copy(tensors)
        everything = {**facts, "step": step, "updates": self.engine.state.updates, "base_sha256": self.base_sha256}
        everything |= {"world_size": self.group.world_size, "zero_stage": self.engine.stage}
        self.upload = threading.Thread(target=self._upload, args=(step, history, everything), daemon=True)
        self.upload.start()

    def wait(self) -> None:
        """Waits for the current upload. Raises unexpected errors of the upload thread."""
        if self.upload:
            self.upload.join()
            self.upload = None
        if self.failure:
            raise self.failure

    def history(self) -> list[dict[str, Any]]:
        """Metrics up to the restored checkpoint. Only available on the first process."""
        return [json.loads(line) for line in self.read_history.splitlines()]

    def restore_step(self, step: int) -> None:
        """Restores the checkpoint of this step."""
        try:
            facts = self._load(self._uri(step))
        except DamagedCheckpointError as error:
            raise DataError(f"the best checkpoint is damaged: {error}. Start again with another `trial`.") from error
        self.engine.restored(facts["updates"])

    def restore(self) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint and returns its manifest; None if there is no checkpoint."""
        steps = self.group.from_main(lambda: saved_steps(self.folder))
        for step in steps:
            uri, facts, problem = self._uri(step), {}, ""
            try:
                facts = self._load(uri)
            except (DamagedCheckpointError, NotFoundError) as error:
                problem = str(error)
            problems = [found for found in self.group.gathered(problem) if found]
            if not problems:
                self.engine.restored(facts["updates"])
                return facts
            if self.group.is_main:
                log.warning("%s is damaged, trying the previous checkpoint: %s", uri, problems[0])
        if steps:
            raise DataError(
                f"none of the {len(steps)} checkpoints in {self.folder} is intact. "
                "Remove them, or start from scratch with another number for `trial`."
            )
        return None

    def _uri(self, step: int) -> str:
        return storage.join(self.folder, f"step-{step:08d}")

    def _file(self, rank: int, world_size: int) -> str:
        return f"state-{rank:05d}-of-{world_size:05d}.safetensors"

    def _upload(self, step: int, history: bytes, facts: dict[str, Any]) -> None:
        try:
            self._write(step, history, facts)
        except Exception as error:  # nothing else would report an error in a thread
            found = as_lost_process(error)
            if isinstance(found, StorageError | LostProcessError):  # the main thread notices the latter by itself
                log.warning("checkpoint of step %d was not finished: %s", step, str(found).splitlines()[0][:200])
            else:
                self.failure = error

    def _write(self, step: int, history: bytes, facts: dict[str, Any]) -> None:
        """Uploads the file of this process; then the first process writes the manifest."""
        written: dict[str, dict[str, Any]] | None = None
        try:
            written = self._write_files(step, history)
        except StorageError as error:
            log.warning("checkpoint of step %d was not written by process %d: %s", step, self.group.rank, error)
        parts: list[Any] = [None] * self.group.world_size
        dist.gather_object(written, parts if self.group.is_main else None, group=self.uploaders)
        if self.group.is_main and None not in parts:
            files = {name: entry for part in parts for name, entry in part.items()}
            manifest.commit_folder(self._uri(step), files, **facts)
            self.pending_step = -1
            self._remove_old(step)

    def _write_files(self, step: int, history: bytes) -> dict[str, dict[str, Any]]:
        files: dict[str, bytes | memoryview] = {}
        if self.snapshot:
            files[self._file(self.group.rank, self.group.world_size)] = self.snapshot.file
        if self.group.is_main:
            files[HISTORY] = history
        for name, data in files.items():
            storage.write(storage.join(self._uri(step), name), data)
        return {name: manifest.file_entry(data) for name, data in files.items()}

    def _remove_old(self, newest: int) -> None:
        """Removes checkpoints that are older than those to keep, including incomplete ones."""
        keep = [step for step in saved_steps(self.folder) if step <= newest][: self.config.keep]
        folders = {
            entry.path.partition("/")[0] for entry in storage.walk(self.folder) if entry.path.startswith("step-")
        }
        for name in folders:
            step = int(name.removeprefix("step-"))
            if step < newest and step not in {*keep, self.best_step}:
                storage.remove(storage.join(self.folder, name))

    def _load(self, uri: str) -> dict[str, Any]:
        try:
            facts = manifest.read_manifest(uri)
            files: dict[str, dict[str, Any]] = facts["files"]
            world_size, stage = facts["world_size"], facts["zero_stage"]
        except (ValueError, KeyError) as error:
            raise DamagedCheckpointError(f"{uri}: its manifest cannot be read") from error
        if facts["base_sha256"] != self.base_sha256:
            raise ConfigError(
                f"the frozen weights must be those that {uri} was trained on, sha256 {facts['base_sha256'][:12]}…, got "
                f"{self.base_sha256[:12]}…. Restore the weights of model.decoder, or start from scratch with another "
                "`trial`."
            )
        if self.group.is_main:
            self.read_history = _verified(uri, HISTORY, files)
        names = [name for name in files if name.startswith("state-")]
        if (world_size, stage) == (self.group.world_size, self.engine.stage) and stage > 0:
            names = [self._file(self.group.rank, world_size)]
        # one file at a time is in memory, and its hash is verified before it is used
        loaded = (safetensors.torch.load(_verified(uri, name, files)) for name in names)
        copied = sum(map(self.engine.state.load, loaded))
        if copied != self.engine.state.numel:
            raise DamagedCheckpointError(
                f"{uri} holds {copied} of the {self.engine.state.numel} values of process {self.group.rank}"
            )
        return facts


def _verified(uri: str, name: str, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    if name not in files:
        raise DamagedCheckpointError(f"{uri} lists no {name}")
    data = storage.read(storage.join(uri, name))
    found = manifest.file_entry(data)
    if found != files[name]:
        raise DamagedCheckpointError(f"{name} must have sha256 {files[name]['sha256']}, got {found['sha256']}")
    return data


def frozen_sha256(network: nn.Module) -> str:
    """Hash of the names and values of all frozen weights; empty if there are none."""
    frozen = {name: value for name, value in network.named_parameters() if not value.requires_grad}
    digest = hashlib.sha256()
    for name, value in sorted(frozen.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""
