import json
from typing import Any

import pytest

from model.data.conversations import Conversation, media_of, parse_conversation, text_of
from model.errors import DataError

VIDEO, IMAGE = {"type": "video", "video": "a.mp4"}, {"type": "image", "image": "b.jpg"}
ASKED = {"role": "user", "content": [VIDEO, {"type": "text", "text": "什么在动？"}]}
ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "小猫"}]}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "看视频。"}]}
TURNS = [{"role": "user", "content": "<video>\n什么在动？"}, {"role": "assistant", "content": "小猫"}]


def parse(**record: Any) -> Conversation:
    return parse_conversation(json.dumps(record, ensure_ascii=False))[0]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS, "videos": ["a.mp4"]},
        {"messages": TURNS, "videos": "a.mp4", "id": 7},
        {
            "conversations": [{"from": "human", "value": "<video>什么在动？"}, {"from": "gpt", "value": "小猫"}],
            "videos": ["a.mp4"],
        },
        {"text": "Human: <|video|>\nHuman: 什么在动？\nAI: 小猫", "video": ["a.mp4"], "task_type": "llava_sft"},
        {"text": "<|video|>\nHuman: 什么在动？\nAI: 小猫", "video": ["a.mp4"]},
    ],
)
def test_all_formats_give_the_same_conversation(record: dict[str, Any]) -> None:
    assert parse(**record) == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "看视频。"}, *TURNS], "videos": ["a.mp4"]},
        {"messages": TURNS, "system": "看视频。", "videos": ["a.mp4"]},
        {"text": "看视频。\nHuman: <|video|>\nHuman: 什么在动？\nAI: 小猫", "video": ["a.mp4"]},
    ],
)
def test_a_system_message_comes_first(record: dict[str, Any]) -> None:
    assert parse(**record) == [SYSTEM, ASKED, ANSWERED]


def test_each_tag_takes_the_next_file_of_its_kind() -> None:
    turns = [{"role": "user", "content": "<image><video> and <video>?"}, {"role": "assistant", "content": "no"}]
    conversation = parse(messages=turns, videos=["a.mp4", "c.mp4"], images=["b.jpg"])
    assert media_of(conversation) == [("image", "b.jpg"), ("video", "a.mp4"), ("video", "c.mp4")]
    assert [part["type"] for part in conversation[0]["content"]] == ["image", "video", "text", "video", "text"]
    assert text_of(conversation[0]) == "and ?"


def test_a_speaker_within_a_line_is_text() -> None:
    conversation = parse(
        text="Human: what is OpenAI: a company?\nHuman: say AI: or Human: \nAI: Yes.\nHuman: b\nAI: No."
    )
    texts = [[part["text"] for part in message["content"]] for message in conversation]
    assert texts == [["what is OpenAI: a company?", "say AI: or Human:"], ["Yes."], ["b"], ["No."]]


def test_the_question_type_is_optional() -> None:
    line = json.dumps({"messages": TURNS, "videos": ["a.mp4"], "question_type": "what"})
    assert parse_conversation(line)[1] == "what"
    assert parse_conversation(json.dumps({"text": "Human: a\nAI: b"}))[1] == ""


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": TURNS}, "one <video> per file in videos, but it has 1 for 0 files"),
        ({"messages": TURNS, "videos": ["a", "b"]}, "it has 1 for 2 files"),
        ({"messages": TURNS, "videos": ["a"], "images": ["b"]}, "one <image> per file in images, but it has 0 for 1"),
        ({"messages": TURNS, "videos": [1]}, r"videos must be a list of paths, but it is '\[1\]'"),
        ({"messages": TURNS[:1], "videos": ["a"]}, "the last turn must be an answer, but the turns are user"),
        ({"messages": [said("assistant", "a")]}, "but the turns are assistant"),
        ({"messages": [*TURNS, TURNS[1]], "videos": ["a"]}, "but the turns are user, assistant, assistant"),
        ({"messages": []}, "but the turns are none"),
        ({"text": "Human: hi"}, "the last turn must be an answer"),
        ({"text": "no speaker"}, "but the turns are none"),
        ({"messages": [said("user", "a"), said("assistant", " ")]}, "a turn of the assistant must not be empty"),
        (
            {"messages": [said("user", "a"), said("assistant", "<image>")], "images": ["b"]},
            "only the user may show videos and images, but a turn of the assistant does",
        ),
        ({"messages": [said("tool", "a")]}, "role must be one of .*, but it is 'tool'"),
        ({"messages": [said("user", ["a"])]}, "content must be a text"),
        ({"messages": [{"role": "user", "content": "a", "loss": False}]}, "but it has role, content, loss"),
        ({"messages": "a"}, "messages must be a list of messages, but it is 'a'"),
        ({"messages": TURNS, "text": "a"}, "must have one of the keys messages, conversations, text, but it has mess"),
        ({"images": []}, "but it has images"),
        ({"messages": TURNS, "videos": ["a"], "audios": ["c"]}, "must have no audios"),
        ({"messages": TURNS, "videos": ["a"], "question_type": 3}, "question_type must be a text"),
        ({"messages": [said("user", "\ud800"), said("assistant", "b")]}, "it has the lone surrogate"),
    ],
)
def test_an_unusable_record_is_explained(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        parse_conversation(json.dumps(record))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", "7", "[" * 100_000])
def test_a_line_must_be_an_object(line: str) -> None:
    with pytest.raises(DataError, match="must be a JSON object"):
        parse_conversation(line)
