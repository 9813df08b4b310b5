"""BLEU, ROUGE-L and CIDEr-D of the COCO caption evaluation, for texts given as lists of words.

The results equal those of pycocoevalcap, which the published figures were computed with; tests compare both. METEOR and
SPICE need Java and are not implemented.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
LONGEST = 4
"""Length of the longest n-grams."""
ROUGE_BETA = 1.2
"""Weight of recall against precision."""
CIDER_SIGMA = 6.0
"""Standard deviation of the penalty on a difference in length."""
SMALL, TINY = 1e-9, 1e-15
"""Added to denominators and numerators of BLEU, which can be 0 for short texts."""


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to 4 of a corpus with several references per candidate, of which the closest in length counts."""
    matched, total = [0] * LONGEST, [0] * LONGEST
    length = reference_length = 0
    for candidate, accepted in zip(candidates, references, strict=True):
        most: Counter[Words] = Counter()
        for reference in accepted:
            most |= _ngrams(reference)
        for ngram, count in (_ngrams(candidate) & most).items():
            matched[len(ngram) - 1] += count
        for n in range(LONGEST):
            total[n] += max(0, len(candidate) - n)
        length += len(candidate)
        gaps = [(abs(len(reference) - len(candidate)), len(reference)) for reference in accepted]
        reference_length += min(gaps)[1]
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(LONGEST):
        product *= (matched[n] + TINY) / (total[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean F-measure of the longest common subsequence, from the best precision and the best recall of a candidate."""
    scores = []
    for candidate, accepted in zip(candidates, references, strict=True):
        # an empty text counts as one empty word
        own, texts = candidate or [""], [reference or [""] for reference in accepted]
        common = [_common_length(text, own) for text in texts]
        precision = max(common) / len(own)
        recall = max(found / len(text) for found, text in zip(common, texts, strict=True))
        weighted = recall + ROUGE_BETA**2 * precision
        scores.append((1 + ROUGE_BETA**2) * precision * recall / weighted if precision and recall else 0.0)
    return float(np.mean(scores))


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """CIDEr-D: mean over clips of 10 x the clipped cosine similarity of TF-IDF weighted n-grams.

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
    return float(np.mean(scores))


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
