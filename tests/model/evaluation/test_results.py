"""Saving and loading of evaluations."""

import json
from pathlib import Path

import pytest

from model.errors import DataError
from model.evaluation.results import Evaluation, load_evaluation, save_evaluation

SAVED = Evaluation(
    task="retrieval",
    model="m",
    protocol={},
    pretrained=True,
    scores={"text_to_video_r1": 0.5},
    untuned={},
    chance={},
    predictions=[{"video": "a", "text": "一"}, {"video": "b", "text": "二"}],
    class_names=[],
    headline="text_to_video_r1",
    captions=[("二", "一"), ("二", "二")],
    nearest_clips=[[1, 0], [1, 0]],
)


def test_a_saved_evaluation_loads_unchanged(tmp_path: Path) -> None:
    assert load_evaluation(save_evaluation(SAVED, str(tmp_path / "scores.json"))) == SAVED


def test_an_evaluation_of_an_earlier_version_is_rejected(tmp_path: Path) -> None:
    old = {key: value for key, value in vars(SAVED).items() if key not in ("headline", "captions")}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match="must hold captions, headline: an earlier version wrote it"):
        load_evaluation(str(tmp_path / "scores.json"))
