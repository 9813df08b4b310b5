"""What a run must reach to count as having learned: better than guessing, and better for having been pre-trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.evaluation.results import Evaluation

CHANCE_FACTORS = {
    ("classification", "top1"): 4.0,
    ("retrieval", "text_to_video_r1"): 10.0,
    ("retrieval", "video_to_text_r1"): 10.0,
}
"""How many times the chance level a pre-trained model must reach."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    task: str
    metric: str
    value: float
    without_pretraining: float
    chance: float | None
    """What guessing scores; None where there is no such level."""
    required: float
    strict: bool
    """Whether the value must exceed `required`, not only reach it."""

    @property
    def passed(self) -> bool:
        return self.value > self.required if self.strict else self.value >= self.required


def check_requirements(evaluations: Sequence[Evaluation]) -> Iterator[Requirement]:
    """Each requirement with what was reached. Needs every task once with and once without pre-training."""
    by_start = {(evaluation.task, evaluation.pretrained): evaluation for evaluation in evaluations}
    for (task, metric), factor in CHANCE_FACTORS.items():
        with_, without = by_start[task, True], by_start[task, False]
        chance = with_.chance[metric]
        yield Requirement(
            task=task, metric=metric, value=with_.scores[metric], without_pretraining=without.scores[metric],
            chance=chance, required=factor * chance, strict=False,
        )  # fmt: skip
    cider, without_cider = (by_start["captioning", start].scores["cider"] for start in (True, False))
    yield Requirement(
        task="captioning", metric="cider", value=cider, without_pretraining=without_cider,
        chance=None, required=without_cider, strict=True,
    )  # fmt: skip
