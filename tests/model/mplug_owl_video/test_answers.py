"""Training rows of the original code: token IDs, and which of them are answers. Its two faults are not repeated."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from model.data.conversations import Conversation, parse_conversation
from model.errors import DataError
from model.mplug_owl_video import MplugOwlProcessor
from model.mplug_owl_video.processing import MplugOwlImageProcessor
from tests.helpers.owl import CHECKPOINT, OwlRecording

RECORDING = OwlRecording("dataset")
FAULTS = {"ai_in_question", "starts_with_media"}
"""A speaker within a user's text starts an answer there, and a medium at the start is text."""
UNANSWERED = {"no_answer", "media_no_answer"}
CASES = [case for case in RECORDING.facts["cases"] if case.partition("/")[2] not in FAULTS | UNANSWERED]


@pytest.fixture(scope="module")
def processor() -> MplugOwlProcessor:
    tokenizer = AutoTokenizer.from_pretrained(str(CHECKPOINT))
    return MplugOwlProcessor(MplugOwlImageProcessor(), tokenizer, RECORDING.facts["media_length"])


def conversation(name: str) -> Conversation:
    text = RECORDING.facts["samples"][name]
    found = re.findall(r"<image>|<\|video\|>", text)
    media = {"image": ["a.jpg"] * found.count("<image>"), "video": ["a.mp4"] * found.count("<|video|>")}
    return parse_conversation(json.dumps({"text": text, **media}))[0]


@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_original_code(processor: MplugOwlProcessor, case: str) -> None:
    length, name = case[1:].split("/")
    ids, are_answers = processor.encode_answers(conversation(name), int(length) + 1)
    facts = RECORDING.facts["cases"][case]
    assert (len(ids), sum(are_answers)) == (facts["seq_length"], facts["supervised_tokens"])
    assert ids == RECORDING[f"out/{case}/input_ids"][: len(ids)].tolist()
    masks = [RECORDING[f"out/{case}/{kind}_mask"] for kind in ("non_padding", "non_media", "prompt")]
    supervised = torch.stack(masks).prod(dim=0)[: len(ids) - 1]
    assert are_answers == [False, *supervised.bool().tolist()]


@pytest.mark.parametrize(("name", "answer", "media"), [("ai_in_question", "Yes.", 0), ("starts_with_media", "ok", 1)])
def test_rows_where_the_original_code_is_wrong(
    processor: MplugOwlProcessor, name: str, answer: str, media: int
) -> None:
    ids, are_answers = processor.encode_answers(conversation(name), 200)
    supervised = [number for number, is_answer in zip(ids, are_answers, strict=True) if is_answer]
    assert processor.decode(supervised[:-1]) == answer
    assert supervised[-1] == processor.tokenizer.eos_token_id
    assert ids.count(-2) == media * processor.media_length


@pytest.mark.parametrize("name", sorted(UNANSWERED))
def test_a_conversation_without_an_answer_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="the last turn must be an answer"):
        conversation(name)


def test_rows_are_the_prompts_of_their_answers(processor: MplugOwlProcessor) -> None:
    messages = conversation("video2")
    ids, are_answers = processor.encode_answers(messages, 200)
    prompt = processor.encode_chat(messages[:-1])
    assert prompt == ids[: len(prompt)]
    assert are_answers[len(prompt) :] == [True] * (len(ids) - len(prompt))
