"""The required results of the demo: better than chance, and better than without pre-training or tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.evaluation.results import Evaluation

CHANCE_FACTORS = {
    ("classification", "top1"): 4.0,
    ("classification", "generation_top1"): 2.0,
    ("retrieval", "text_to_video_r1"): 10.0,
    ("retrieval", "video_to_text_r1"): 10.0,
    ("instruction", "accuracy"): 1.25,
    ("instruction", "accuracy_what"): 1.25,
    ("instruction", "accuracy_colour"): 1.25,
    ("instruction", "accuracy_where"): 1.25,
}
"""Multiple of the chance level that a model must reach, besides the score of its baseline."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    task: str
    metric: str
    value: float
    baseline: float
    """The score without pre-training, of a model that is tuned on instructions before tuning."""
    chance: float | None
    """Score of guessing; None if the metric has no chance level."""
    required: float
    strict: bool
    """Whether the value must exceed `required` instead of reaching it."""

    @property
    def passed(self) -> bool:
        return self.value > self.required if self.strict else self.value >= self.required


def check_requirements(evaluations: Sequence[Evaluation]) -> Iterator[Requirement]:
    """Each requirement with the value reached. Needs every task with its baseline."""
    found = compared(evaluations)
    for (task, metric), factor in CHANCE_FACTORS.items():
        evaluation, baseline = found[task]
        chance = evaluation.chance[metric]
        yield Requirement(
            task=task,
            metric=metric,
            value=evaluation.scores[metric],
            baseline=baseline[metric],
            chance=chance,
            required=max(factor * chance, baseline[metric]),
            strict=False,
        )
    captioning, without = found["captioning"]
    cider, without_cider = captioning.scores["cider"], without["cider"]
    yield Requirement(
        task="captioning",
        metric="cider",
        value=cider,
        baseline=without_cider,
        chance=None,
        required=without_cider,
        strict=True,
    )


def compared(evaluations: Sequence[Evaluation]) -> dict[str, tuple[Evaluation, dict[str, float]]]:
    """By task: its evaluation, and the scores of its baseline, without pre-training or untuned."""
    without = {evaluation.task: evaluation.scores for evaluation in evaluations if not evaluation.pretrained}
    return {
        evaluation.task: (evaluation, evaluation.untuned or without[evaluation.task])
        for evaluation in evaluations
        if evaluation.pretrained or evaluation.untuned
    }
