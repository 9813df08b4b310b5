"""BLEU, ROUGE-L and CIDEr-D of the COCO caption evaluation, for texts given as lists of words.

The results equal those of pycocoevalcap, which the published figures were computed with; tests compare both. METEOR and
SPICE need Java and are not implemented.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = Sequence[str]
LONGEST = 4
"""Length of the longest n-grams."""
ROUGE_BETA = 1.2
"""Weight of recall against precision."""
CIDER_SIGMA = 6.0
"""Standard deviation of the penalty on a difference in length."""
SMALL, TINY = 1e-9, 1e-15
"""Added to denominators and numerators of BLEU, which can be 0 for short texts."""


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
    """Counts from whose sums BLEU follows, (texts, 10): matched and all 1- to 4-grams, own and reference length.

    Of several references, the closest in length counts.
    """
    rows = []
    for candidate, accepted in zip(candidates, references, strict=True):
        most: Counter[Words] = Counter()
        for reference in accepted:
            most |= _ngrams(reference)
        matched = [0] * LONGEST
        for ngram, count in (_ngrams(candidate) & most).items():
            matched[len(ngram) - 1] += count
        total = [max(0, len(candidate) - n) for n in range(LONGEST)]
        gaps = [(abs(len(reference) - len(candidate)), len(reference)) for reference in accepted]
        rows.append([*matched, *total, len(candidate), min(gaps)[1]])
    return np.array(rows, dtype=float)


def bleu_scores(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU-1 to 4 (S, 4) of S corpora, from the sums of their counts (S, 10)."""
    scores = []
    for *ngrams, length, reference_length in counts.tolist():
        ratio = (length + TINY) / (reference_length + SMALL)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, own = 1.0, []
        for n in range(LONGEST):
            product *= (ngrams[n] + TINY) / (ngrams[LONGEST + n] + SMALL)
            own.append(product ** (1 / (n + 1)) * brevity)
        scores.append(own)
    return np.array(scores)


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
    """F-measure of the longest common subsequence of each candidate, from its best precision and its best recall."""
    scores = []
    for candidate, accepted in zip(candidates, references, strict=True):
        # an empty text counts as one empty word
        own, texts = candidate or [""], [reference or [""] for reference in accepted]
        common = [_common_length(text, own) for text in texts]
        precision = max(common) / len(own)
        recall = max(found / len(text) for found, text in zip(common, texts, strict=True))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if precision and recall else 0.0)
    return np.array(scores)


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
    """CIDEr-D of each candidate: 10 x the clipped cosine similarity of TF-IDF weighted n-grams.

    IDF is taken from the references of the evaluated clips, so a single clip always scores 0.
    """
    texts_with = Counter(ngram for accepted in references for ngram in set().union(*map(_ngrams, accepted)))
    texts = np.log(float(len(references)))

    def weigh(words: Words) -> list[dict[Words, float]]:
        """Weights of the 1-grams, 2-grams, … of a text."""
        weights: list[dict[Words, float]] = [{} for _ in range(LONGEST)]
        for ngram, count in _ngrams(words).items():
            weights[len(ngram) - 1][ngram] = float(count) * (texts - np.log(max(1.0, texts_with[ngram])))
        return weights

    scores = []
    for candidate, accepted in zip(candidates, references, strict=True):
        own, similarity = weigh(candidate), np.zeros(LONGEST)
        for reference in accepted:
            # the published implementation measures lengths in 2-grams
            gap = float(max(0, len(candidate) - 1) - max(0, len(reference) - 1))
            penalty = math.e ** (-(gap**2) / (2 * CIDER_SIGMA**2))
            pairs = zip(own, weigh(reference), strict=True)
            similarity += np.array([_clipped_cosine(ours, theirs) * penalty for ours, theirs in pairs])
        scores.append(np.mean(similarity) / len(accepted) * 10.0)
    return np.array(scores)


def _clipped_cosine(ours: dict[Words, float], theirs: dict[Words, float]) -> float:
    """Cosine similarity with clipped weights, so that repeating an n-gram gains nothing."""
    product = 0.0
    for ngram, weight in ours.items():
        known = theirs.get(ngram, 0.0)
        product += min(weight, known) * known
    norms = [np.sqrt(sum(weight**2 for weight in weights.values())) for weights in (ours, theirs)]
    return product / (norms[0] * norms[1]) if all(norms) else product


def _ngrams(words: Words) -> "Counter[Words]":
    starts = ((n, start) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1))
    return Counter(tuple(words[start : start + n]) for n, start in starts)


def _common_length(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            longer = diagonal + 1 if word == other else max(lengths[column - 1 : column + 1])
            diagonal, lengths[column] = lengths[column], longer
    return lengths[-1]
