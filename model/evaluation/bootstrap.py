"""Confidence intervals of metrics and of their differences, by a bootstrap over clips.

A sample draws as many clips as the split has, with replacement; all rows of a clip are drawn together. Galleries, and
the document frequencies of CIDEr-D, stay those of the split.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from model.tasks.metrics import Floats, Measures, combine

SAMPLES = 1000
LEVEL = 0.95
SAMPLES_AT_ONCE = 50
Interval = tuple[float, float]


def intervals(measures: Measures, videos: Sequence[str]) -> dict[str, Interval]:
    """The interval of each metric that 95 % of the samples are in. `videos` are the clips of the predictions."""
    return _intervals(_sampled(measures, videos))


def difference_intervals(ours: Measures, theirs: Measures, videos: Sequence[str]) -> dict[str, Interval]:
    """The intervals of the differences ours - theirs, each from the same samples of both."""
    mine, other = _sampled(ours, videos), _sampled(theirs, videos)
    return _intervals({name: mine[name] - other[name] for name in mine if name in other})


def _sampled(measures: Measures, videos: Sequence[str]) -> dict[str, Floats]:
    """The metrics of SAMPLES samples, each (SAMPLES,)."""
    found = [combine(measures, weights) for weights in _weights(videos)]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _weights(videos: Sequence[str]) -> Iterator[Floats]:
    """How often each row is drawn, (samples, rows)."""
    names, clips = np.unique(np.array(videos), return_inverse=True)
    rng = np.random.default_rng(0)
    for _ in range(0, SAMPLES, SAMPLES_AT_ONCE):
        drawn = rng.integers(len(names), size=(SAMPLES_AT_ONCE, len(names)))
        counts = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
        yield counts[:, clips].astype(float)


def _intervals(samples: dict[str, Floats]) -> dict[str, Interval]:
    found = {}
    for name, values in samples.items():
        known = values[~np.isnan(values)]  # a sample may have no clip of a rare kind
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = float(low), float(high)
    return found
