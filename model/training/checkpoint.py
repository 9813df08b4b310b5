"""Checkpoints of a run in storage, and what a restarted run goes on from.

    <output>/checkpoints/<name>-<digest>/
        step-00001000/   state-00000-of-00008.safetensors …, history.jsonl, manifest.json
        run.json         how often the run was started, and how it ended

A step waits for a copy of its numbers in memory only; a thread writes them. Files come first, the manifest last:
without it there is no checkpoint. Frozen weights are not in it, their hash is.
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
from model.errors import ConfigError, DataError, LostProcessError, NotFoundError, StorageError
from model.training.attempts import saved_steps
from model.training.distributed import Processes, as_lost_process
from model.training.engine import Engine
from model.training.snapshot import Snapshot

log = logging.getLogger("mplug")
HISTORY = "history.jsonl"


class DamagedCheckpointError(Exception):
    """A checkpoint that is not what its manifest says."""


class Checkpoints:
    """Saves and restores one run; all processes call each method together."""

    def __init__(
        self, folder: str, config: CheckpointConfig, engine: Engine, base_sha256: str, group: Processes
    ) -> None:
        self.folder, self.config, self.engine, self.group = folder, config, engine, group
        self.base_sha256 = base_sha256
        self.snapshot: Snapshot | None = None
        self.upload: threading.Thread | None = None
        self.failure: Exception | None = None
        """What ended the upload, where it was not storage."""
        # of the uploading threads alone: they must not meet the training's collectives
        self.uploaders = dist.new_group(backend="gloo")
        self.best_step = -1
        """Kept, whatever comes after it."""
        self.lost_step = -1
        """The checkpoint that was begun last, until it is whole; only the first process knows."""
        self.read_history = b""

    def save(self, step: int, history: bytes, facts: Mapping[str, Any], best_step: int = -1) -> None:
        """Copies this process's state and returns; a thread writes it. Waits for the one before, if it is not done.

        A checkpoint that cannot be written is logged: the run goes on, and the next one is another try.
        """
        self.wait()
        self.best_step, self.lost_step = best_step, step
        self._copy()
        everything = {**facts, "step": step, "updates": self.engine.state.updates, "base_sha256": self.base_sha256}
        everything |= {"world_size": self.group.world_size, "zero_stage": self.engine.stage}
        self.upload = threading.Thread(target=self._upload, args=(step, history, everything), daemon=True)
        self.upload.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises what the writing thread did not expect."""
        if self.upload:
            self.upload.join()
            self.upload = None
        if self.failure:
            raise self.failure

    def history(self) -> list[dict[str, Any]]:
        """Metrics up to the checkpoint that was loaded, as the run wrote them; the first process has them."""
        return [json.loads(line) for line in self.read_history.splitlines()]

    def restore_step(self, step: int) -> None:
        """Loads one checkpoint that this run has written."""
        try:
            facts = self._load(self._uri(step))
        except DamagedCheckpointError as error:
            raise DataError(f"the best checkpoint is damaged: {error}. Start again with another `trial`.") from error
        self.engine.restored(facts["updates"])

    def restore(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is whole; its manifest, or None where there is none."""
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
                log.warning("%s is damaged, the one before it is tried: %s", uri, problems[0])
        if steps:
            raise DataError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole. "
                "Remove them, or start from nothing with another number for `trial`."
            )
        return None

    def _uri(self, step: int) -> str:
        return storage.join(self.folder, f"step-{step:08d}")

    def _file(self, rank: int, world_size: int) -> str:
        return f"state-{rank:05d}-of-{world_size:05d}.safetensors"

    def _copy(self) -> None:
        if self.engine.stage == 0 and not self.group.is_main:
            return  # every process holds the same
        tensors = self.engine.state.tensors()
        if self.snapshot is None:
            self.snapshot = Snapshot(tensors)
        self.snapshot.copy(tensors)

    def _upload(self, step: int, history: bytes, facts: dict[str, Any]) -> None:
        try:
            self._write(step, history, facts)
        except Exception as error:  # of a thread, which nobody would hear of
            found = as_lost_process(error)
            if isinstance(found, StorageError | LostProcessError):  # the main thread learns of the latter by itself
                log.warning("checkpoint of step %d was not finished: %s", step, str(found).splitlines()[0][:200])
            else:
                self.failure = error

    def _write(self, step: int, history: bytes, facts: dict[str, Any]) -> None:
        """One process's file; then the first process's manifest, which makes a checkpoint of them."""
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
            self.lost_step = -1
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
        """Removes what is older than the checkpoints to keep, half-written ones included."""
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
                f"{self.base_sha256[:12]}…. Give model.decoder back its weights, or start anew with another `trial`."
            )
        if self.group.is_main:
            self.read_history = _verified(uri, HISTORY, files)
        names = [name for name in files if name.startswith("state-")]
        if (world_size, stage) == (self.group.world_size, self.engine.stage) and stage > 0:
            names = [self._file(self.group.rank, world_size)]
        # one file at a time is in memory, and none is used before its hash is right
        loaded = (safetensors.torch.load(_verified(uri, name, files)) for name in names)
        copied = sum(map(self.engine.state.load, loaded))
        if copied != self.engine.state.numel:
            raise DamagedCheckpointError(
                f"{uri} holds {copied} of the {self.engine.state.numel} numbers of process {self.group.rank}"
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
    """Hash of all weights that are not trained, by name; empty where there are none."""
    frozen = {name: value for name, value in network.named_parameters() if not value.requires_grad}
    digest = hashlib.sha256()
    for name, value in sorted(frozen.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if frozen else ""
