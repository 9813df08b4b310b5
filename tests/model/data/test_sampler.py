from collections import Counter
from itertools import chain

import pytest

from model.data.sampler import BatchSampler, Draw, epoch_order


def draws(world_size: int, *, start_step: int = 0, steps: int = 30) -> list[list[Draw]]:
    """Global batches of all processes, put together."""
    ranks = [
        BatchSampler(
            size=50, seed=3, batch_size=8, steps=steps, rank=rank, world_size=world_size, start_step=start_step
        )
        for rank in range(world_size)
    ]
    return [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


def test_each_clip_comes_exactly_once_per_epoch() -> None:
    counts = Counter(chain.from_iterable(draws(1, steps=25)))  # 200 draws: four epochs of 50
    assert set(counts) == {(epoch, index) for epoch in range(4) for index in range(50)}
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_number_of_processes_changes_no_batch(world_size: int) -> None:
    assert draws(world_size) == draws(1)


@pytest.mark.parametrize("step", [1, 7, 29])
def test_a_run_goes_on_from_any_step(step: int) -> None:
    assert draws(2, start_step=step) == draws(4)[step:]


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
