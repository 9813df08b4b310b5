import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from model.mplug_video.processing import clean_caption
from model.mplug_video.tokenization import encode_pair, encode_sentence, load_tokenizer, train_bpe_tokenizer
from tests.helpers.paths import FIXTURES

GOLDEN = json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))
CLEANED = json.loads((FIXTURES / "cleaned_captions.json").read_text(encoding="utf-8"))
TOKENIZER = load_tokenizer(FIXTURES / "upstream" / "modelscope_gpt3" / "tokenizer.json")


@pytest.mark.parametrize("case", GOLDEN["sentences"], ids=lambda case: case["text"][:12])
def test_encoding_truncation_and_decoding_match_upstream(case: dict) -> None:
    assert encode_sentence(TOKENIZER, case["text"], 1000) == case["ids"]
    assert encode_sentence(TOKENIZER, case["text"], GOLDEN["max_length"]) == case["cut"]
    assert TOKENIZER.decode(case["ids"], skip_special_tokens=True) == case["decoded"]


@pytest.mark.parametrize("case", GOLDEN["pairs"], ids=lambda case: f"{case['prompt'][:8]}|{case['answer'][:8]}")
def test_pairs_truncate_the_prompt_before_the_answer(case: dict) -> None:
    encoded = encode_pair(TOKENIZER, case["prompt"], case["answer"], GOLDEN["max_length"])
    assert encoded == (case["ids"], case["prompt_length"])


@pytest.mark.parametrize("case", CLEANED, ids=lambda case: f"{case['input'][:16]!r}-{case['max_words']}")
def test_caption_cleaning_matches_upstream(case: dict) -> None:
    assert clean_caption(case["input"], case["max_words"]) == case["output"]


def test_a_trained_tokenizer_has_the_published_special_tokens(tmp_path: Path) -> None:
    trained = train_bpe_tokenizer(["红色的小猫在草地上", "蓝色的汽车在公路上"] * 20, vocab_size=300)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = encode_sentence(loaded, "红色的汽车 iPhone", 100)
    assert ids == encode_sentence(trained, "红色的汽车 iPhone", 100)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<sep>", "<|endoftext|>", "<|endoftext|>")
    assert (ids[0], ids[-1]) == (5, 7)
    assert loaded.decode(ids, skip_special_tokens=True) == "红色的汽车 iPhone"
    assert len(loaded) <= 300
