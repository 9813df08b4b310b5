"""What a stored evaluation says of its predictions."""

from pathlib import Path

import pytest

from model.evaluation.results import Evaluation, load_evaluation, save_evaluation


def evaluation(task: str, predictions: list[dict]) -> Evaluation:
    return Evaluation(
        task=task, model="m", pretrained=True, scores={}, chance={}, predictions=predictions, class_names=[]
    )


RETRIEVED = evaluation(
    "retrieval",
    [
        {"video": "a", "text": "一", "video_embedding": [1.0, 0.0], "text_embedding": [0.6, 0.8]},
        {"video": "b", "text": "二", "video_embedding": [0.0, 1.0], "text_embedding": [0.0, 1.0]},
        {"video": "c", "text": "三", "video_embedding": [0.8, 0.6], "text_embedding": [0.9, 0.1]},
    ],
)
MATCHED = evaluation(
    "matching",
    [{"video": "a", "text": "一", "head_scores": [0.1, 0.9]}, {"video": "b", "text": "二", "head_scores": [0.3, 0.2]}],
)
CAPTIONED = evaluation("captioning", [{"video": "a", "prediction": "一", "references": ["二", "三"]}])


@pytest.mark.parametrize(
    ("found", "captions"),
    [
        (RETRIEVED, [("三", "一"), ("二", "二"), ("一", "三")]),
        (MATCHED, [("二", "一"), ("一", "二")]),
        (CAPTIONED, [("一", "二")]),
    ],
)
def test_a_clip_has_the_predicted_and_the_true_text(found: Evaluation, captions: list[tuple[str, str]]) -> None:
    assert found.captions() == captions


def test_the_nearest_clips_of_a_text_come_first() -> None:
    assert RETRIEVED.nearest_clips(2) == [[2, 1], [1, 2], [0, 2]]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_evaluation(save_evaluation(RETRIEVED, str(tmp_path / "scores.json"))) == RETRIEVED
