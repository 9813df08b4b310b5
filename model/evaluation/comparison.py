"""Compares two evaluations prediction by prediction."""

from dataclasses import dataclass

from model.errors import ConfigError
from model.evaluation.bootstrap import difference_intervals
from model.evaluation.results import Evaluation


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of two models on the same predictions."""

    metric: str
    ours: float
    theirs: float
    low: float
    """95 % of the resampled splits have a difference ours - theirs from `low` to `high`."""
    high: float

    def __str__(self) -> str:
        return (
            f"{self.ours:.4f} against {self.theirs:.4f}, difference {self.ours - self.theirs:+.4f} "
            f"({self.low:+.4f} to {self.high:+.4f})"
        )


def compare_evaluations(ours: Evaluation, theirs: Evaluation) -> list[Difference]:
    """The metrics that both have. Raises ConfigError unless both have the same protocol, which includes the data."""
    names = dict.fromkeys([*ours.protocol, *theirs.protocol])
    differing = [
        f"{name} is {ours.protocol.get(name, 'none')!r} and {theirs.protocol.get(name, 'none')!r}"
        for name in names
        if ours.protocol.get(name) != theirs.protocol.get(name)
    ]
    if ours.videos != theirs.videos and not differing:
        differing = ["the clips are others"]
    if differing:
        raise ConfigError(
            f"evaluations must have the same protocol to be compared, but {'; '.join(differing)} ({ours.model} and "
            f"{theirs.model}). Evaluate both again in the same way."
        )
    found = difference_intervals(ours.measures, theirs.measures, ours.videos)
    return [
        Difference(metric=name, ours=ours.scores[name], theirs=theirs.scores[name], low=low, high=high)
        for name, (low, high) in found.items()
    ]
