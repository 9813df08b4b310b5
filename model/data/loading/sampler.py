"""The order of samples: a pure function of (seed, epoch, position), independent of the number of processes.

Positions count clips from the start of training. A permutation per epoch maps them to clips, so every clip is read
exactly once per epoch on any number of processes, and a run can resume from any step. The permutation is computed, not
stored: it needs no memory for ten million clips, and constant time per clip.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Draw = tuple[int, int]
"""(epoch, position in the dataset)"""
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """This process's part of each global micro-batch of a run."""

    size: int
    seed: int
    batch_size: int
    """Clips per micro-batch, summed over all processes."""
    steps: int
    """Micro-batches of the whole run."""
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    def batch(self, step: int) -> list[Draw]:
        """The clips of micro-batch `step`, counted from 0 at the start of the run."""
        first = step * self.batch_size
        positions = np.arange(first + self.rank, first + self.batch_size, self.world_size)
        epochs, offsets = np.divmod(positions, self.size)
        draws: list[Draw] = []
        for epoch in np.unique(epochs).tolist():  # a batch may span two epochs
            order = epoch_order(self.seed, epoch, self.size, offsets[epochs == epoch])
            draws += [(epoch, position) for position in order.tolist()]
        return draws


@dataclass(frozen=True, kw_only=True)
class EverySample:
    """Every clip of a split once, in order. With n processes, each has every n-th batch."""

    size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start_step: int = 0

    @property
    def steps(self) -> int:
        batches = -(-self.size // self.batch_size)
        return -(-(batches - self.rank) // self.world_size)

    def batch(self, step: int) -> list[Draw]:
        first = (step * self.world_size + self.rank) * self.batch_size
        return [(0, position) for position in range(first, min(first + self.batch_size, self.size))]


def epoch_order(seed: int, epoch: int, size: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in the dataset of the clips at `offsets` of an epoch: a permutation of range(size).

    A Feistel network permutes the smallest power of four that is at least `size`. Results outside of the range are
    permuted again until they are inside: cycle walking (Black and Rogaway, CT-RSA 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), np.uint64)
    order = _feistel(offsets.astype(np.uint64), half, keys)
    while (outside := order >= size).any():
        order[outside] = _feistel(order[outside], half, keys)
    return order.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of range(4**half)."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << np.uint64(half)) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit changes each output bit with probability 1/2."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
