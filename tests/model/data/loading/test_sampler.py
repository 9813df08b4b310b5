from collections import Counter
from itertools import chain

import numpy as np
import pytest

from model.data.loading.sampler import BatchSampler, Draw, EverySample, epoch_order


def draws(world_size: int, steps: int = 30) -> list[list[Draw]]:
    """Global batches, combined from all processes."""
    ranks = [
        BatchSampler(size=50, seed=3, batch_size=8, steps=steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [sorted(chain.from_iterable(rank.batch(step) for rank in ranks)) for step in range(steps)]


def whole(seed: int, epoch: int, size: int) -> list[int]:
    return epoch_order(seed, epoch, size, np.arange(size)).tolist()


def test_each_clip_occurs_exactly_once_per_epoch() -> None:
    counts = Counter(chain.from_iterable(draws(1, steps=25)))  # 200 draws: four epochs of 50
    assert set(counts) == {(epoch, index) for epoch in range(4) for index in range(50)}
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_batches_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    assert draws(world_size) == draws(1)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4096, 4097, 100_003])
def test_the_order_is_a_permutation_for_any_size(size: int) -> None:
    assert sorted(whole(seed=7, epoch=2, size=size)) == list(range(size))


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [tuple(whole(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_looks_random() -> None:
    """Neighbours, halves of the dataset and epochs are as uncorrelated as in a shuffle."""
    size = 100_000
    first, second = (np.array(whole(1, epoch, size)) for epoch in (0, 1))
    bound = 5 / size**0.5  # five standard deviations
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < bound
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < bound
    gaps = np.abs(np.diff(first)) < size // 100
    assert gaps.mean() == pytest.approx(0.02, abs=0.003)


def test_ten_million_clips_are_ordered_without_a_table() -> None:
    sampler = BatchSampler(size=10_000_000, seed=0, batch_size=384, steps=10**9)
    late = sampler.batch(10**6)  # in the 38th epoch
    assert len({position for _, position in late}) == 384
    assert {epoch for epoch, _ in late} == {38}


def test_an_evaluation_reads_every_clip_once_in_order() -> None:
    plan = EverySample(size=10, batch_size=4)
    assert [len(plan.batch(step)) for step in range(plan.steps)] == [4, 4, 2]
    assert list(chain.from_iterable(plan.batch(step) for step in range(plan.steps))) == [(0, n) for n in range(10)]
