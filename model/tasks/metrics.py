"""Metrics of predictions, as pure functions (arXiv 2306.04362 section 5)."""

import re

import numpy as np
from numpy.typing import NDArray

from model.tasks.base import Predictions, Scores
from model.tasks.caption_metrics import bleu, cider_d, rouge_l

NOT_CHINESE = re.compile(r"[^\u4e00-\u9fa5]")
CAPTION_METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")
RECALLED = (1, 5, 10)
RECALL_METRICS = tuple(f"{way}_r{k}" for way in ("text_to_video", "video_to_text") for k in RECALLED)


def recalls(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> dict[int, float]:
    """Share of queries (rows) with a relevant item (column) among the k most similar, for each k of RECALLED.

    Ties count against the model: an item that ties with a relevant one ranks before it.
    """
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    rank = ((similarity >= best) & ~relevant).sum(axis=1)
    return {k: float((rank < k).mean()) for k in RECALLED}


def recall_scores(
    predictions: Predictions, text_to_video: NDArray[np.float64], video_to_text: NDArray[np.float64]
) -> Scores:
    """Recalls of both directions from similarities (queries, items). All rows of the same clip are relevant."""
    names = np.array([prediction["video"] for prediction in predictions])
    relevant = names[:, None] == names[None, :]
    ways = {"text_to_video": text_to_video, "video_to_text": video_to_text}
    return {f"{way}_r{k}": value for way, sims in ways.items() for k, value in recalls(sims, relevant).items()}


def recall_chance(predictions: Predictions) -> Scores:
    """Recalls of random guessing, with every clip equally likely."""
    count = len({prediction["video"] for prediction in predictions})
    return {f"{way}_r{k}": min(k / count, 1) for way in ("text_to_video", "video_to_text") for k in RECALLED}


def nearest_texts(predictions: Predictions, similarity: NDArray[np.float64]) -> list[tuple[str, str]]:
    """(nearest, own) text of each clip, by the similarity (clips, texts)."""
    nearest = similarity.argmax(axis=1).tolist()
    return [(predictions[found]["text"], row["text"]) for row, found in zip(predictions, nearest, strict=True)]


def nearest_columns(similarity: NDArray[np.float64], count: int) -> list[list[int]]:
    """For each row, the `count` most similar columns, nearest first."""
    return (-similarity).argsort(axis=1, kind="stable")[:, :count].tolist()


def caption_scores(predictions: Predictions) -> Scores:
    """BLEU-1 to 4, ROUGE-L and CIDEr-D on Chinese characters.

    As upstream: only U+4E00 to U+9FA5 count, each character is a word, and a clip's first row wins.
    """
    first = {prediction["video"]: prediction for prediction in reversed(predictions)}
    order = dict.fromkeys(prediction["video"] for prediction in predictions)
    candidates = [chinese_characters(first[video]["prediction"]) for video in order]
    references = [[chinese_characters(text) for text in first[video]["references"]] for video in order]
    scores = [*bleu(candidates, references), rouge_l(candidates, references), cider_d(candidates, references)]
    return dict(zip(CAPTION_METRICS, scores, strict=True))


def chinese_characters(text: str) -> list[str]:
    return list(NOT_CHINESE.sub("", text))
