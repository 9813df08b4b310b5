"""The processes of one run: who am I, how many are we, on which device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)
"""Of a collective operation. The slowest ordinary one is rank 0 publishing a model while the others wait."""


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over all processes, which must all call this with the same names."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).tolist(), strict=True))
