"""From predictions to metrics, as pure functions that import no torch (arXiv 2306.04362 section 5).

A prediction has measures: numbers such as the rank of the right answer. A metric combines the measures of a split, or
of a weighted sample of it, which is how confidence intervals and paired comparisons are computed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.tasks.caption_metrics import bleu_counts, bleu_scores, cider_d, rouge_l

Prediction = dict[str, Any]
"""One evaluated clip: `video`, and fields of the task. In JSON types after `Evaluator.finish`."""
Predictions = Sequence[Prediction]
Scores = dict[str, float]
"""Metrics by name."""
Floats = NDArray[np.float64]
Measures = dict[str, Floats]
"""Values of each prediction by name, (rows,); NaN for a prediction without one."""

NOT_CHINESE = re.compile(r"[^\u4e00-\u9fa5]")
BLEU = tuple(f"bleu{n}" for n in (1, 2, 3, 4))
CAPTION_METRICS = (*BLEU, "rouge_l", "cider")
ACCURACIES = (1, 5)
RECALLED = (1, 5, 10)
WAYS = ("text_to_video", "video_to_text")
RECALL_METRICS = tuple(
    f"{way}_{name}" for way in WAYS for name in (*(f"r{k}" for k in RECALLED), "mean_rank", "median_rank")
)
COUNT, RANK = "bleu_", "_rank"
"""Start of the names of measures whose sums give BLEU, and end of those of ranks."""
NEAREST = 10
"""Number of nearest clips and texts that are kept for each query."""
QUERIES_AT_ONCE = 1024
"""Queries whose similarities to a whole gallery are in memory together."""
Similarities = Callable[[slice], NDArray[np.float32]]
"""The similarities of some queries to all items, (queries, items)."""


SEARCH_PROTOCOL = {"gallery": "all rows of the split", "matches": "all rows of a clip", "ties": "count as wrong"}
CAPTION_PROTOCOL = {"references": "all of a clip's first row", "words": "single characters of U+4E00 to U+9FA5"}


def combine(measures: Measures, weights: Floats | None = None) -> dict[str, Floats]:
    """The metrics of S samples, each (S,), in which prediction r counts `weights[s, r]` times; without, of the split.

    Ranks give recalls, their mean and their median; counts of n-grams give BLEU; anything else its mean.
    """
    found: dict[str, Floats] = {}
    counts = [values for name, values in measures.items() if name.startswith(COUNT)]
    if counts:
        found |= dict(zip(BLEU, bleu_scores(_sums(np.stack(counts, axis=1), weights)).T, strict=True))
    for name, values in measures.items():
        if name.endswith(RANK):
            base = name.removesuffix(RANK)
            found |= {f"{base}_r{k}": _mean(np.where(np.isnan(values), np.nan, values <= k), weights) for k in RECALLED}
            found |= {f"{base}_mean_rank": _mean(values, weights), f"{base}_median_rank": _median(values, weights)}
        elif not name.startswith(COUNT):
            found[name] = _mean(values, weights)
    return found


def score(measures: Measures) -> Scores:
    """The metrics of a split."""
    return {name: float(value[0]) for name, value in combine(measures).items()}


def lower_is_better(metric: str) -> bool:
    return metric == "loss" or metric.endswith(RANK)


def _sums(values: Floats, weights: Floats | None) -> Floats:
    """Sums (S, columns) of values (rows, columns) that are not NaN."""
    return np.nansum(values, axis=0)[None] if weights is None else weights @ np.nan_to_num(values)


def _mean(values: Floats, weights: Floats | None) -> Floats:
    known = ~np.isnan(values)
    if weights is None:
        return np.array([values[known].mean() if known.any() else np.nan])
    total = weights[:, known].sum(axis=1)
    means = np.full(len(weights), np.nan)  # of a sample without any of these predictions
    return np.divide(weights[:, known] @ values[known], total, out=means, where=total > 0)


def _median(values: Floats, weights: Floats | None) -> Floats:
    if weights is None:
        return np.array([np.nanmedian(values)])
    order = np.argsort(values, kind="stable")
    passed = weights[:, order].cumsum(axis=1)
    half = passed[:, -1:] / 2
    low, high = (passed >= half).argmax(axis=1), (passed > half).argmax(axis=1)
    return (values[order][low] + values[order][high]) / 2


def top_measures(scores: Floats, labels: NDArray[np.int64], prefix: str = "") -> Measures:
    """Whether the right class is among the best 1 and 5, by scores (clips, classes). Of equals, the first wins."""
    ranks = (-scores).argsort(axis=1, kind="stable")
    return {f"{prefix}top{k}": (ranks[:, :k] == labels[:, None]).any(axis=1).astype(float) for k in ACCURACIES}


def rank_matches(
    similarities: Similarities, videos: Sequence[str], nearest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each query, the rank of its match, from 1, and the `nearest` most similar items, (queries, nearest).

    Query and item i belong to the clip videos[i]. All items of a query's clip match, and the best of them counts. Ties
    count against the model: an item that ties with the best match ranks before it.
    """
    clips = np.unique(np.array(videos), return_inverse=True)[1]
    ranks, items = [], []
    for start in range(0, len(clips), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)
        similarity = similarities(block)
        matches = clips[block, None] == clips
        best = np.where(matches, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((similarity >= best) & ~matches).sum(axis=1))
        items.append(_most_similar(similarity, nearest))
    return np.concatenate(ranks), np.concatenate(items)


def _most_similar(similarity: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The columns of the largest values of each row, largest first."""
    count = min(count, similarity.shape[1])
    found = np.sort(np.argpartition(-similarity, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(similarity, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def ranked(
    predictions: Predictions, text_to_video: Similarities, video_to_text: Similarities, prefix: str = ""
) -> Iterator[Prediction]:
    """For each prediction its clip and text, their ranks, and the nearest clips and texts, as positions."""
    videos = [row["video"] for row in predictions]
    (clip_ranks, clips), (text_ranks, texts) = (
        rank_matches(way, videos, NEAREST) for way in (text_to_video, video_to_text)
    )
    names = [f"{prefix}{name}" for name in (*(f"{way}{RANK}" for way in WAYS), "nearest_clips", "nearest_texts")]
    for row, *values in zip(predictions, clip_ranks, text_ranks, clips, texts, strict=True):
        found = {name: value.tolist() for name, value in zip(names, values, strict=True)}
        yield {"video": row["video"], "text": row["text"], **found}


def rank_measures(predictions: Predictions, prefixes: Sequence[str] = ("",)) -> Measures:
    names = [f"{prefix}{way}{RANK}" for prefix in prefixes for way in WAYS]
    return {name: column(predictions, name) for name in names}


def column(predictions: Predictions, name: str) -> Floats:
    return np.array([row[name] for row in predictions], dtype=float)


def recall_chance(predictions: Predictions) -> Scores:
    """Recalls of random guessing, with every clip equally likely."""
    count = len({prediction["video"] for prediction in predictions})
    return {f"{way}_r{k}": min(k / count, 1) for way in WAYS for k in RECALLED}


def nearest_texts(predictions: Predictions) -> list[tuple[str, str]]:
    """(nearest, own) text of each clip."""
    return [(predictions[row["nearest_texts"][0]]["text"], row["text"]) for row in predictions]


def caption_measures(predictions: Predictions) -> Measures:
    """Counts for BLEU, ROUGE-L and CIDEr-D on Chinese characters.

    As upstream: only U+4E00 to U+9FA5 count, each character is a word, and a clip's first row wins.
    """
    first = {prediction["video"]: number for number, prediction in reversed(list(enumerate(predictions)))}
    rows = sorted(first.values())
    candidates = [chinese_characters(predictions[row]["prediction"]) for row in rows]
    references = [[chinese_characters(text) for text in predictions[row]["references"]] for row in rows]
    counts = bleu_counts(candidates, references)
    found = {f"{COUNT}{number}": values for number, values in enumerate(counts.T)}
    found |= {"rouge_l": rouge_l(candidates, references), "cider": cider_d(candidates, references)}
    measures = {name: np.full(len(predictions), np.nan) for name in found}
    for name, values in found.items():
        measures[name][rows] = values
    return measures


def chinese_characters(text: str) -> list[str]:
    return list(NOT_CHINESE.sub("", text))


def confusion_matrix(predictions: Predictions, class_names: Sequence[str]) -> list[list[int]]:
    """Clips by true (rows) and predicted category (columns). A prediction that names no category is in none."""
    counts = Counter((row["label"], row["prediction"]) for row in predictions)
    return [[counts[true, predicted] for predicted in class_names] for true in class_names]


def category_table(predictions: Predictions, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each category its clips, the share that is recognised, and what it is mistaken for most often."""
    rows = []
    for name, counts in zip(class_names, confusion_matrix(predictions, class_names), strict=True):
        own, clips = counts[class_names.index(name)], sum(row["label"] == name for row in predictions)
        others = {other: count for other, count in zip(class_names, counts, strict=True) if other != name and count}
        rows.append(
            {
                "category": name,
                "clips": clips,
                "recall": own / clips if clips else None,
                "mistaken_for": max(others, key=lambda other: others[other], default=""),
            }
        )
    return rows
