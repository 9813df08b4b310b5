"""Saving and loading of evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.errors import DataError
from model.evaluation.results import Evaluation, load_evaluation, save_evaluation

SAVED = Evaluation(
    task="retrieval",
    model="m",
    shards="s",
    protocol={},
    pretrained=True,
    scores={"text_to_video_r1": 0.5},
    untuned={},
    chance={},
    intervals={"text_to_video_r1": (0.0, 1.0)},
    class_names=[],
    headline="text_to_video_r1",
    predictions=[
        {
            "video": "a",
            "shown": {"predicted": "二\u2028", "true": "一"},
            "measures": {"text_to_video_rank": 1.0, "accuracy_what": 1.0},
        },
        {"video": "b", "shown": {"predicted": "二", "true": "二"}, "measures": {"text_to_video_rank": 2.0}},
    ],
)


def test_a_saved_evaluation_loads_unchanged(tmp_path: Path) -> None:
    found = load_evaluation(save_evaluation(SAVED, str(tmp_path)))
    assert found == SAVED
    assert found.videos == ["a", "b"]
    assert found.captions == [("二\u2028", "一"), ("二", "二")]
    assert found.measures["text_to_video_rank"].tolist() == [1, 2]
    assert np.isnan(found.measures["accuracy_what"]).tolist() == [False, True]


def test_an_evaluation_of_an_earlier_version_is_rejected(tmp_path: Path) -> None:
    old = {key: value for key, value in vars(SAVED).items() if key not in ("headline", "intervals", "predictions")}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match="must hold headline, intervals: an earlier version wrote it"):
        load_evaluation(str(tmp_path))
