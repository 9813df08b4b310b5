import pytest

from model.evaluation.acceptance import check_requirements
from model.evaluation.results import Evaluation

TYPES = ("accuracy", "accuracy_what", "accuracy_colour", "accuracy_where")
CHANCE = {
    "classification": {"top1": 0.125, "generation_top1": 0.125},
    "retrieval": {"text_to_video_r1": 0.01, "video_to_text_r1": 0.01},
    "captioning": {},
    "instruction": dict.fromkeys(TYPES, 0.2),
}


def evaluations(
    *,
    top1: float = 0.6,
    generation: float = 0.4,
    recall: float = 0.2,
    cider: float = 1.0,
    cider_without: float = 0.5,
    what: float = 0.9,
    where_untuned: float = 0.0,
) -> list:
    scores = {
        "classification": {"top1": top1, "generation_top1": generation},
        "retrieval": {"text_to_video_r1": recall, "video_to_text_r1": 0.3},
        "captioning": {"cider": cider},
        "instruction": {**dict.fromkeys(TYPES, 0.9), "accuracy_what": what},
    }
    without = {**scores, "captioning": {"cider": cider_without}}
    untuned = {"instruction": {**dict.fromkeys(TYPES, 0.0), "accuracy_where": where_untuned}}
    return [
        Evaluation(
            task=task,
            model="m",
            shards="s",
            protocol={},
            pretrained=start and task != "instruction",
            scores=table[task],
            untuned=untuned.get(task, {}),
            chance=CHANCE[task],
            predictions=[],
            class_names=[],
            headline="",
            intervals={},
        )
        for start, table in ((True, scores), (False, without))
        for task in CHANCE
        if start or task != "instruction"
    ]


def missed(**values: float) -> list[str]:
    return [row.metric for row in check_requirements(evaluations(**values)) if not row.passed]


def test_a_run_that_meets_all_requirements_passes() -> None:
    assert missed() == []


@pytest.mark.parametrize(
    ("values", "metric"),
    [
        ({"top1": 0.49}, "top1"),
        ({"generation": 0.24}, "generation_top1"),
        ({"recall": 0.099}, "text_to_video_r1"),
        ({"cider": 0.5}, "cider"),
        ({"what": 0.24}, "accuracy_what"),
        ({"where_untuned": 0.91}, "accuracy_where"),
    ],
)
def test_a_missed_requirement_is_reported(values: dict[str, float], metric: str) -> None:
    assert missed(**values) == [metric]


def test_exactly_the_required_value_passes() -> None:
    assert missed(top1=0.5, recall=0.1) == []
