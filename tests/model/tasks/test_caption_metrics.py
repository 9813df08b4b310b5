"""Compares the caption metrics with pycocoevalcap on random texts and edge cases."""

import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from model.tasks.caption_metrics import bleu_counts, bleu_scores, cider_d, rouge_l

WORDS = "一二三四五六"
Corpus = tuple[list[str], list[list[str]]]
"""Candidates and their references."""


def text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.choice([0, 1, 2, 3, 5, 8, 13, 40])))


def random_corpus(seed: int) -> Corpus:
    rng = random.Random(seed)
    references = [[text(rng) for _ in range(rng.randint(1, 4))] for _ in range(rng.choice([1, 2, 5, 30]))]
    copies = [rng.choice([text(rng), accepted[0], accepted[-1] * 2]) for accepted in references]
    return copies, references


EDGES: dict[str, Corpus] = {
    "one clip": (["一二三"], [["一二三"]]),
    "an empty candidate": (["", "一二"], [["一二三"], ["一二"]]),
    "an empty reference": (["一二", "三"], [[""], ["三"]]),
    "nothing in common": (["一一", "二二"], [["三三"], ["四四"]]),
    "all the same": (["一二"] * 5, [["一二", "一二"]] * 5),
    "repeated words": (["一" * 30, "一二"], [["一二三"], ["一" * 5]]),
    "two references equally far in length": (["一二三"], [["一二", "一二三四"]]),
}
CASES = {**EDGES, **{f"random {seed}": random_corpus(seed) for seed in range(60)}}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_pycocoevalcap(name: str) -> None:
    candidates, references = CASES[name]
    hypotheses = {number: [" ".join(text)] for number, text in enumerate(candidates)}
    truth = {number: [" ".join(text) for text in texts] for number, texts in enumerate(references)}
    expected = [*Bleu(4).compute_score(truth, hypotheses, verbose=0)[0]]
    expected += [scorer.compute_score(truth, hypotheses)[0] for scorer in (Rouge(), Cider())]
    words = [list(text) for text in candidates], [[list(text) for text in texts] for texts in references]
    (bleu,) = bleu_scores(bleu_counts(*words).sum(axis=0)[None])
    found = [*bleu, rouge_l(*words).mean(), cider_d(*words).mean()]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_empty_texts_have_a_score() -> None:
    assert cider_d(["", ""], [[""], ["", ""]]).tolist() == [0, 0]


def test_cider_d_of_a_single_clip_is_zero() -> None:
    assert cider_d(["一二三四"], [["一二三四"]]).tolist() == [0]
