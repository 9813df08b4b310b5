"""Compares metrics with recorded values of upstream and with brute force."""

import json
import random
import statistics

import numpy as np
import pytest

from model.tasks import metrics
from model.tasks.base import Task
from model.tasks.captioning import Captioning
from model.tasks.classification import Classification
from model.tasks.matching import Matching
from model.tasks.metrics import Prediction
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


def brute_force_ranks(similarity: list[list[float]], clips: list[str]) -> list[int]:
    ranks = []
    for row, clip in zip(similarity, clips, strict=True):
        best = max(value for value, other in zip(row, clips, strict=True) if other == clip)
        ranks.append(1 + sum(value >= best for value, other in zip(row, clips, strict=True) if other != clip))
    return ranks


def blocks_of(similarity: list[list[float]]) -> metrics.Similarities:
    return lambda block: np.array(similarity, dtype=np.float32)[block]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_match_a_brute_force_count(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 7)
    rng = random.Random(seed)
    similarity = [[round(rng.random(), 1) for _ in range(30)] for _ in range(30)]  # rounded to create ties
    clips = [str(rng.choice((row, row, 3))) for row in range(30)]
    ranks, nearest = metrics.rank_matches(blocks_of(similarity), clips, 4)
    expected = brute_force_ranks(similarity, clips)
    assert ranks.tolist() == expected
    for row, found in zip(similarity, nearest.tolist(), strict=True):
        assert [row[item] for item in found] == sorted(row, reverse=True)[:4]
    found = metrics.score({"x_rank": ranks.astype(float)})
    assert found["x_median_rank"] == statistics.median(expected)
    assert found["x_mean_rank"] == pytest.approx(statistics.mean(expected))
    assert found["x_r5"] == pytest.approx(sum(rank <= 5 for rank in expected) / 30)


def test_ties_give_no_recall() -> None:
    ranks, _ = metrics.rank_matches(blocks_of([[0.0] * 4] * 4), list("abcd"), 2)
    assert metrics.score({"x_rank": ranks.astype(float)})["x_r1"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_weighted_sample_is_that_of_repeated_predictions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = ["小猫在跑"[: row % 5] for row in range(9)]
    rows = [{"video": str(row), "prediction": text, "references": ["小猫跑", "大狗"]} for row, text in enumerate(texts)]
    measures = metrics.caption_measures(rows) | {
        "x_rank": rng.integers(1, 7, 9).astype(float),
        "accuracy_what": np.where(rng.random(9) < 0.4, np.nan, rng.integers(0, 2, 9)),
    }
    weights = rng.integers(0, 4, (3, 9))
    found = metrics.combine(measures, weights.astype(float))
    for sample, counts in enumerate(weights):
        repeated = {name: np.repeat(values, counts) for name, values in measures.items()}
        expected = metrics.score(repeated)
        assert {name: values[sample] for name, values in found.items()} == pytest.approx(expected, nan_ok=True)


def test_rows_of_one_clip_are_all_correct_answers() -> None:
    rows = [
        {"video": "a", "text": "", "video_embedding": [1.0, 0.0], "text_embedding": [0.0, 1.0]},
        {"video": "a", "text": "", "video_embedding": [0.0, 1.0], "text_embedding": [1.0, 0.0]},
        {"video": "b", "text": "", "video_embedding": [0.6, 0.8], "text_embedding": [0.6, 0.8]},
    ]
    assert Retrieval.score(Retrieval.finish(rows), [])["text_to_video_r1"] == 1.0


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
    scores = Matching.score(Matching.finish(predictions), [])
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
    {"video": "a", "text": "一", "head_scores": [0.1, 0.9], "generation_scores": [0.0, 0.0]},
    {"video": "b", "text": "二", "head_scores": [0.3, 0.2], "generation_scores": [0.0, 0.0]},
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
    assert task.captions(task.finish(predictions)) == captions


def test_the_nearest_clips_of_a_text_come_first() -> None:
    assert [row["nearest_clips"] for row in Retrieval.finish(RETRIEVED)] == [[2, 1, 0], [1, 2, 0], [0, 2, 1]]
    assert [row["nearest_clips"] for row in Matching.finish(MATCHED)] == [[1, 0], [0, 1]]
