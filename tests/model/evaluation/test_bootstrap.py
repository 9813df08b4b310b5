"""Intervals by resampling clips."""

import numpy as np
import pytest

from model.evaluation.bootstrap import difference_intervals, intervals

RNG = np.random.default_rng(3)


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    right = (RNG.random(2000) < 0.3).astype(float)
    low, high = intervals({"top1": right}, list(map(str, range(2000))))["top1"]
    share = right.mean()
    half = 1.96 * np.sqrt(share * (1 - share) / 2000)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.004)


def test_rows_of_a_clip_are_drawn_together() -> None:
    right = np.repeat((RNG.random(100) < 0.5).astype(float), 20)
    videos = [str(row // 20) for row in range(2000)]
    low, high = intervals({"accuracy": right}, videos)["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.15)  # as of 100 clips, not of 2000 rows


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    theirs = (RNG.random(500) < 0.5).astype(float)
    ours = np.where(RNG.random(500) < 0.05, 1.0, theirs)
    videos = list(map(str, range(500)))
    low, high = difference_intervals({"top1": ours}, {"top1": theirs}, videos)["top1"]
    assert low <= ours.mean() - theirs.mean() <= high
    own = intervals({"top1": ours}, videos)["top1"]
    assert high - low < (own[1] - own[0]) / 2


def test_a_rare_kind_of_row_has_an_interval() -> None:
    values = np.full(30, np.nan)
    values[0] = 1.0
    assert intervals({"accuracy_rare": values}, list(map(str, range(30))))["accuracy_rare"] == (1.0, 1.0)


def test_equal_predictions_differ_by_nothing() -> None:
    ranks = RNG.integers(1, 20, 50).astype(float)
    found = difference_intervals({"x_rank": ranks}, {"x_rank": ranks}, list(map(str, range(50))))
    assert set(found.values()) == {(0.0, 0.0)}
