"""Compares metrics with recorded values of upstream and with brute force."""

import json
import random

import numpy as np
import pytest

from model.tasks import metrics
from model.tasks.base import Prediction, Task
from model.tasks.captioning import Captioning
from model.tasks.classification import Classification
from model.tasks.matching import Matching
from model.tasks.retrieval import Retrieval
from tests.helpers.paths import FIXTURES

GOLDEN = json.loads((FIXTURES / "caption_metrics.json").read_text(encoding="utf-8"))


def test_caption_metrics_equal_upstream() -> None:
    rows = [{"video": row["video_id"], "prediction": row["pred"], "references": row["gold"]} for row in GOLDEN["pairs"]]
    scores = Captioning.score(rows, [])
    expected = GOLDEN["scores"]
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == [expected[f"Bleu_{n}"] for n in (1, 2, 3, 4)]
    assert scores["rouge_l"] == expected["ROUGE_L"]
    assert scores["cider"] == expected["CIDEr"]


def test_only_chinese_characters_count() -> None:
    assert "".join(metrics.chinese_characters("广场舞 MV 第3集！")) == "广场舞第集"


def brute_force_recall(similarity: list[list[float]], relevant: list[list[bool]], k: int) -> float:
    hits = 0
    for row, wanted in zip(similarity, relevant, strict=True):
        best = max(value for value, is_relevant in zip(row, wanted, strict=True) if is_relevant)
        before = sum(value >= best for value, is_relevant in zip(row, wanted, strict=True) if not is_relevant)
        hits += before < k
    return hits / len(similarity)


@pytest.mark.parametrize("seed", range(5))
def test_recalls_match_a_brute_force_count(seed: int) -> None:
    rng = random.Random(seed)
    similarity = [[round(rng.random(), 1) for _ in range(30)] for _ in range(20)]  # rounded to create ties
    relevant = [[column == row or rng.random() < 0.03 for column in range(30)] for row in range(20)]
    found = metrics.recalls(np.array(similarity), np.array(relevant))
    assert found == {k: brute_force_recall(similarity, relevant, k) for k in (1, 5, 10)}


def test_ties_give_no_recall() -> None:
    assert metrics.recalls(np.zeros((4, 4)), np.eye(4, dtype=bool))[1] == 0


def test_rows_of_one_clip_are_all_correct_answers() -> None:
    rows = [
        {"video": "a", "video_embedding": [1.0, 0.0], "text_embedding": [0.0, 1.0]},
        {"video": "a", "video_embedding": [0.0, 1.0], "text_embedding": [1.0, 0.0]},
        {"video": "b", "video_embedding": [0.6, 0.8], "text_embedding": [0.6, 0.8]},
    ]
    assert Retrieval.score(rows, [])["text_to_video_r1"] == 1.0


def test_accuracy_counts_both_heads() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    rows = [
        {"label": "b", "head_scores": [0, 9, 0, 0, 0, 0], "generation_scores": [9, 5, 4, 3, 2, 1]},
        {"label": "f", "head_scores": [6, 5, 4, 3, 2, 1], "generation_scores": [6, 5, 4, 3, 2, 1]},
    ]
    scores = Classification.score(rows, names)
    assert scores == {"top1": 0.5, "top5": 0.5, "generation_top1": 0.0, "generation_top5": 0.5}


def test_chance_levels() -> None:
    rows = [{"video": str(number)} for number in range(20)]
    assert Classification.chance(rows, list("abcdefgh"))["top1"] == 1 / 8
    assert Retrieval.chance(rows, [])["video_to_text_r5"] == 1 / 4
    assert Captioning.chance(rows, []) == {}


def test_matching_ranks_in_both_directions() -> None:
    head = [[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.1, 0.3, 0.6]]  # the second clip prefers the title of the first
    answers = [[-3.0, -1.0, -2.0]] * 3
    predictions = [
        {"video": f"{row}.mp4", "text": str(row), "head_scores": head[row], "generation_scores": answers[row]}
        for row in range(3)
    ]
    scores = Matching.score(predictions, [])
    assert scores["video_to_text_r1"] == pytest.approx(2 / 3)
    assert scores["text_to_video_r1"] == 1
    assert scores["generation_video_to_text_r1"] == pytest.approx(1 / 3)
    assert scores["generation_text_to_video_r1"] == 0  # all clips are tied
    assert Matching.chance(predictions, [])["text_to_video_r1"] == pytest.approx(1 / 3)


RETRIEVED = [
    {"video": "a", "text": "一", "video_embedding": [1.0, 0.0], "text_embedding": [0.6, 0.8]},
    {"video": "b", "text": "二", "video_embedding": [0.0, 1.0], "text_embedding": [0.0, 1.0]},
    {"video": "c", "text": "三", "video_embedding": [0.8, 0.6], "text_embedding": [0.9, 0.1]},
]
MATCHED = [
    {"video": "a", "text": "一", "head_scores": [0.1, 0.9]},
    {"video": "b", "text": "二", "head_scores": [0.3, 0.2]},
]


@pytest.mark.parametrize(
    ("task", "predictions", "captions"),
    [
        (Retrieval, RETRIEVED, [("三", "一"), ("二", "二"), ("一", "三")]),
        (Matching, MATCHED, [("二", "一"), ("一", "二")]),
        (Captioning, [{"video": "a", "prediction": "一", "references": ["二", "三"]}], [("一", "二")]),
        (Classification, [{"video": "a", "prediction": "x", "label": "y"}], [("x", "y")]),
    ],
)
def test_shown_clips_have_predicted_and_true_texts(
    task: type[Task], predictions: list[Prediction], captions: list[tuple[str, str]]
) -> None:
    assert task.captions(predictions) == captions


def test_the_nearest_clips_of_a_text_come_first() -> None:
    assert Retrieval.nearest_clips(RETRIEVED, 2) == [[2, 1], [1, 2], [0, 2]]
    assert Matching.nearest_clips(MATCHED, 1) == [[1], [0]]
