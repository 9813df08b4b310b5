"""Valid and faulty collate functions and readers that loader processes can import."""

import os
import signal
from typing import NoReturn

import torch

from model.data.loading.loader import Batch, Example
from model.data.loading.sampler import BatchSampler, Draw
from model.data.shards.format import Record
from model.data.shards.reader import ShardReader
from model.errors import StorageError


def collate(examples: list[Example]) -> Batch:
    return {
        "videos": [item.annotation.video for item in examples],
        "clips": torch.stack([item.clip for item in examples]),
        "seeds": [item.seed for item in examples],
    }


class StubbornError(StorageError):
    """Cannot be unpickled, because it needs more than its message."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


ERRORS = {
    "bug": ZeroDivisionError("a bug"),
    "outage": StorageError("no answer"),
    "stubborn": StubbornError("no answer", 503),
    "runtime": RuntimeError("shapes do not fit"),
}


class FailingReader(ShardReader):
    """Fails for every second clip, in the read-ahead threads."""

    failure = ""

    def record(self, position: int) -> Record:
        if position % 2:
            raise ERRORS[self.failure]
        return super().record(position)


class Chosen(BatchSampler):
    """Clips 3 and 11 first."""

    def batch(self, step: int) -> list[Draw]:
        return [(0, 3), (0, 11)]


def with_a_lambda(examples: list[Example]) -> Batch:
    """A batch that cannot be pickled."""
    return {"function": lambda: examples}


def killed(examples: list[Example]) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Unloadable:
    """Fails when a loader process unpickles it."""

    def __call__(self, examples: list[Example]) -> Batch:
        raise AssertionError

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _fail, ("this cannot be loaded",)


def _fail(message: str) -> NoReturn:
    raise ValueError(message)
