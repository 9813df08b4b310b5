"""The process group of a run: rank, world size, device, and agreement between processes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from model.config.schema import WatchdogConfig
from model.errors import LostProcessError

T = TypeVar("T")


ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Variables that torchrun sets for a single process."""


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """Process group for agreements, always on the CPU. None: this process is alone, and no group was joined."""

    @classmethod
    def alone(cls) -> "Processes":
        """This process, without a process group."""
        return cls(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on the first process and returns its result on all processes."""
        if not self.control:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one process."""
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        return bool(flags.item())

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, on all processes."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values  # type: ignore[return-value]

    def collected(self, value: T) -> list[T]:
        """The values of all processes on the first process; elsewhere an empty list."""
        if not self.control:
            return [value]
        values: list[T | None] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []  # type: ignore[return-value]

    def table(self, values: dict[str, float]) -> dict[str, list[float]]:
        """The numbers of all processes by name. All processes must pass the same names."""
        own = torch.tensor(list(values.values()), dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self.control)
        return {name: [float(row[column]) for row in rows] for column, name in enumerate(values)}


@contextmanager
def processes(deadlines: WatchdogConfig) -> Iterator[Processes]:
    """Joins the process group of torchrun's environment, and leaves it at the end.

    Raises LostProcessError if a peer is lost.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # the watchdog identifies the late process, so a collective must wait longer than any section may take. DeepSpeed's
    # groups use torch's default timeout, which has no public setting
    longest = timedelta(seconds=60 + max(deadlines.model_dump().values()))
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(c10d, name, longest)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=longest)
        yield Processes(rank, world_size, device, dist.new_group(backend="gloo"))
        dist.destroy_process_group()  # not after an error: it would wait for lost peers
    except RuntimeError as error:
        raise as_lost_process(error) from error.__cause__


def as_lost_process(error: BaseException) -> BaseException:
    """A LostProcessError if torch raised this error for a lost peer or loader process; otherwise the error itself."""
    if isinstance(error, LostProcessError):
        return error
    text = str(error) or type(error).__name__
    lost = isinstance(error, dist.DistError) or "gloo" in text or "DataLoader worker (pid" in text
    # the last two come from the pipe to a loader process during its start
    if (isinstance(error, RuntimeError) and lost) or isinstance(error, EOFError | ConnectionError):
        return LostProcessError(f"a process of the run is gone: {text.splitlines()[0][:200]}")
    return error


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over all processes, which must all pass the same names."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).tolist(), strict=True))
