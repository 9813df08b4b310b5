"""Metrics of the three benchmarks, as pure functions of predictions (arXiv 2306.04362 section 5)."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from model.tasks.base import Prediction

Scores = dict[str, float]
NOT_CHINESE = re.compile(r"[^\u4e00-\u9fa5]")


def classification(predictions: Sequence[Prediction], class_names: Sequence[str]) -> Scores:
    """Top-1 and top-5 accuracy of the head, and of the answers' likelihoods (`generation_`)."""
    labels = np.array([class_names.index(prediction["label"]) for prediction in predictions])
    scores: Scores = {}
    for source, prefix in (("head_scores", ""), ("generation_scores", "generation_")):
        logits = np.array([prediction[source] for prediction in predictions])
        ranks = (-logits).argsort(axis=1, kind="stable")
        for k in (1, 5):
            scores[f"{prefix}top{k}"] = float((ranks[:, :k] == labels[:, None]).any(axis=1).mean())
    return scores


def retrieval(predictions: Sequence[Prediction]) -> Scores:
    """Recall at 1, 5 and 10 from text to video and back; rows of the same clip are each other's answers."""
    videos = np.array([prediction["video_embedding"] for prediction in predictions])
    texts = np.array([prediction["text_embedding"] for prediction in predictions])
    names = np.array([prediction["video"] for prediction in predictions])
    relevant = names[:, None] == names[None, :]
    return {
        **{f"text_to_video_r{k}": value for k, value in recalls(texts @ videos.T, relevant).items()},
        **{f"video_to_text_r{k}": value for k, value in recalls(videos @ texts.T, relevant).items()},
    }


def matching(predictions: Sequence[Prediction]) -> Scores:
    """Recalls as in retrieval, by the head's probabilities and by the answers' likelihoods (`generation_`)."""
    names = np.array([prediction["video"] for prediction in predictions])
    relevant = names[:, None] == names[None, :]
    scores: Scores = {}
    for source, prefix in (("head_scores", ""), ("generation_scores", "generation_")):
        similarity = np.array([prediction[source] for prediction in predictions])  # (clips, texts)
        for way, sims in (("text_to_video", similarity.T), ("video_to_text", similarity)):
            scores |= {f"{prefix}{way}_r{k}": value for k, value in recalls(sims, relevant).items()}
    return scores


def recalls(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> dict[int, float]:
    """Share of queries (rows) with a relevant item (column) among the k most similar, for k of 1, 5 and 10.

    Ties count against the model: an item that ties with a relevant one ranks before it.
    """
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    rank = ((similarity >= best) & ~relevant).sum(axis=1)
    return {k: float((rank < k).mean()) for k in (1, 5, 10)}


def captioning(predictions: Sequence[Prediction]) -> Scores:
    """BLEU-1 to 4, ROUGE-L and CIDEr on Chinese characters.

    As upstream: only U+4E00 to U+9FA5 count, each character is a word, and a clip's first row wins. METEOR and SPICE
    need Java and are left out.
    """
    references: dict[str, list[str]] = {}
    candidates: dict[str, list[str]] = {}
    for prediction in predictions:
        if prediction["video"] not in candidates:
            candidates[prediction["video"]] = [spaced(prediction["prediction"])]
            references[prediction["video"]] = [spaced(text) for text in prediction["references"]]
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    rouge, _ = Rouge().compute_score(references, candidates)
    cider, _ = Cider().compute_score(references, candidates)
    return {**{f"bleu{n}": float(bleu[n - 1]) for n in (1, 2, 3, 4)}, "rouge_l": float(rouge), "cider": float(cider)}


def spaced(text: str) -> str:
    """Chinese characters only, one space between each."""
    return " ".join(NOT_CHINESE.sub("", text))


NAMES = {
    "classification": tuple(f"{source}top{k}" for source in ("", "generation_") for k in (1, 5)),
    "retrieval": tuple(f"{way}_r{k}" for way in ("text_to_video", "video_to_text") for k in (1, 5, 10)),
    "matching": tuple(
        f"{source}{way}_r{k}"
        for source in ("", "generation_")
        for way in ("text_to_video", "video_to_text")
        for k in (1, 5, 10)
    ),
    "captioning": ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"),
}
"""What `score` gives for each task."""


def score_predictions(task: str, predictions: Sequence[Prediction], class_names: Sequence[str]) -> Scores:
    """The metrics of a task."""
    match task:
        case "classification":
            return classification(predictions, class_names)
        case "retrieval":
            return retrieval(predictions)
        case "matching":
            return matching(predictions)
        case _:
            return captioning(predictions)


def chance_scores(task: str, predictions: Sequence[Prediction], class_names: Sequence[str]) -> Scores:
    """What guessing scores: equal odds for every class or clip. Captioning has no chance level."""
    match task:
        case "classification":
            return {f"{prefix}top{k}": min(k / len(class_names), 1) for prefix in ("", "generation_") for k in (1, 5)}
        case "retrieval" | "matching":
            count = len({prediction["video"] for prediction in predictions})
            return {f"{way}_r{k}": min(k / count, 1) for way in ("text_to_video", "video_to_text") for k in (1, 5, 10)}
        case _:
            return {}
