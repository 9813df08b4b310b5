"""Which clip comes when: a pure function of (seed, epoch, position), whatever the number of processes.

Positions count clips from the start of training. A permutation of the dataset per epoch maps them to clips, so every
clip comes exactly once per epoch, on any number of processes, and a run can go on from any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Draw = tuple[int, int]
"""(epoch, position in the dataset)"""


@dataclass(frozen=True, kw_only=True)
class BatchSampler(Sampler[list[Draw]]):
    """Yields this process's share of each global micro-batch, from `start_step` on."""

    size: int
    seed: int
    batch_size: int
    """Clips per micro-batch over all processes."""
    steps: int
    """Micro-batches of the whole run."""
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size
            yield [
                self.draw(position) for position in range(first + self.rank, first + self.batch_size, self.world_size)
            ]

    def __len__(self) -> int:
        return self.steps - self.start_step

    def draw(self, position: int) -> Draw:
        epoch, offset = divmod(position, self.size)
        return epoch, int(epoch_order(self.seed, epoch, self.size)[offset])


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)
