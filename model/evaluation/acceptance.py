"""The required results of the demo: better than chance, and better with pre-training than without."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.evaluation.results import Evaluation

CHANCE_FACTORS = {
    ("classification", "top1"): 4.0,
    ("retrieval", "text_to_video_r1"): 10.0,
    ("retrieval", "video_to_text_r1"): 10.0,
}
"""Multiple of the chance level that a pre-trained model must reach."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    task: str
    metric: str
    value: float
    without_pretraining: float
    chance: float | None
    """Score of guessing; None if the metric has no chance level."""
    required: float
    strict: bool
    """Whether the value must exceed `required` instead of reaching it."""

    @property
    def passed(self) -> bool:
        return self.value > self.required if self.strict else self.value >= self.required


def check_requirements(evaluations: Sequence[Evaluation]) -> Iterator[Requirement]:
    """Each requirement with the value reached. Needs every task with and without pre-training."""
    by_start = {(evaluation.task, evaluation.pretrained): evaluation for evaluation in evaluations}
    for (task, metric), factor in CHANCE_FACTORS.items():
        with_, without = by_start[task, True], by_start[task, False]
        chance = with_.chance[metric]
        yield Requirement(
            task=task,
            metric=metric,
            value=with_.scores[metric],
            without_pretraining=without.scores[metric],
            chance=chance,
            required=factor * chance,
            strict=False,
        )
    cider, without_cider = (by_start["captioning", start].scores["cider"] for start in (True, False))
    yield Requirement(
        task="captioning",
        metric="cider",
        value=cider,
        without_pretraining=without_cider,
        chance=None,
        required=without_cider,
        strict=True,
    )
