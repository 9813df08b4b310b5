"""Reads conversations about videos and images, one JSON object per line (JSONL), in three formats:

    {"messages": [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", …}], "videos": ["a.mp4"]}
    {"conversations": [{"from": "human", "value": "<video>What moves?"}, {"from": "gpt", …}], "videos": ["a.mp4"]}
    {"text": "Human: <|video|>\\nHuman: What moves?\\nAI: A cat.", "video": ["a.mp4"]}

The first is that of ms-swift, the second that of LLaMA-Factory, the third that of mPLUG-Owl. `images` and `<image>`
work like `videos`. Each tag stands for the next file of its kind. `question_type` is optional; evaluations score each
type.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from model.errors import DataError

Part = dict[str, str]
"""{"type": "text", "text": …}, {"type": "video", "video": path} or {"type": "image", "image": path}."""
Conversation = list[dict[str, Any]]
"""Messages {"role": "system", "user" or "assistant", "content": [Part, …]}."""

TAGS = {"<video>": "video", "<|video|>": "video", "<image>": "image"}
TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
TURN = re.compile(r"^(Human|AI): ?", re.MULTILINE)
"""Start of a turn in the format of mPLUG-Owl. Within a line, "AI: " is part of the text."""
FORMATS = {"messages": ("role", "content"), "conversations": ("from", "value"), "text": ("", "")}
"""Key of the conversation, and the keys of role and text of a message."""
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def parse_conversation(line: str) -> tuple[Conversation, str]:
    """The conversation of a line, and its question type. Raises DataError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"must be a JSON object: {error}.") from error
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, but it is {line.strip()[:40]!r}.")
    found = [key for key in FORMATS if key in record]
    if len(found) != 1:
        raise DataError(f"must have one of the keys {', '.join(FORMATS)}, but it has {', '.join(record) or 'none'}.")
    if record.get("audios"):
        raise DataError("must have no audios: the model hears nothing.")
    question_type = record.get("question_type", "")
    if not isinstance(question_type, str):
        raise DataError(f"question_type must be a text, but it is {question_type!r}.")
    turns = _turns_of_text(record["text"]) if found == ["text"] else list(_turns(record, found[0]))
    files = {kind: _files(record, kind) for kind in ("video", "image")}
    conversation = _with_media(turns, files)
    _validate(conversation)
    try:
        json.dumps([conversation, question_type], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"must be text, but it has the lone surrogate {error.object[error.start]!r}.") from error
    return conversation, question_type


def media_of(conversation: Conversation) -> list[tuple[str, str]]:
    """(kind, path) of every video and image, in reading order."""
    parts = [part for message in conversation for part in message["content"]]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, without its media."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def _turns(record: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """(role, text) of each message."""
    role_key, text_key = FORMATS[key]
    if system := record.get("system"):
        yield "system", _text(system, "system")
    messages = record[key]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{key} must be a list of messages, but it is {str(messages)[:40]!r}.")
    for message in messages:
        if set(message) != {role_key, text_key}:
            raise DataError(f"a message must have the keys {role_key} and {text_key}, but it has {', '.join(message)}.")
        if message[role_key] not in ROLES:
            raise DataError(f"{role_key} must be one of {', '.join(ROLES)}, but it is {message[role_key]!r}.")
        yield ROLES[message[role_key]], _text(message[text_key], text_key)


def _turns_of_text(text: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn of mPLUG-Owl's format. Media before the first turn belong to it."""
    head, *rest = TURN.split(_text(text, "text"))
    tags = "".join(TAG.findall(head))
    system = TAG.sub("", head).strip()
    turns = [
        ("user" if speaker == "Human" else "assistant", said)
        for speaker, said in zip(rest[::2], rest[1::2], strict=True)
    ]
    return [*([("system", system)] if system else []), *([("user", tags)] if tags else []), *turns]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key} must be a text, but it is {str(value)[:40]!r}.")
    return value


def _files(record: dict[str, Any], kind: str) -> list[str]:
    """The paths of one kind of media, under the key `videos` or `video`."""
    given = record.get(f"{kind}s") or record.get(kind) or []
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise DataError(f"{kind}s must be a list of paths, but it is {str(given)[:40]!r}.")
    return files


def _with_media(turns: list[tuple[str, str]], files: dict[str, list[str]]) -> Conversation:
    """The messages with a file in the place of each tag. Consecutive turns of a role are one message."""
    pieces = [(role, TAG.split(text)) for role, text in turns]
    for kind, paths in files.items():
        tags = sum(TAGS.get(piece) == kind for _, texts in pieces for piece in texts)
        if tags != len(paths):
            raise DataError(f"must have one <{kind}> per file in {kind}s, but it has {tags} for {len(paths)} files.")
    upcoming = {kind: iter(paths) for kind, paths in files.items()}
    conversation: Conversation = []
    for role, texts in pieces:
        parts: list[Part] = []
        for piece in texts:
            if kind := TAGS.get(piece, ""):
                parts.append({"type": kind, kind: next(upcoming[kind])})
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        if conversation and conversation[-1]["role"] == role == "user":
            conversation[-1]["content"] += parts
        else:
            conversation.append({"role": role, "content": parts})
    return conversation


def _validate(conversation: Conversation) -> None:
    spoken = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    roles = [message["role"] for message in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            "user and assistant must take turns and the last turn must be an answer, but the turns are "
            f"{', '.join(roles) or 'none'}."
        )
    for message in conversation:
        kinds = {part["type"] for part in message["content"]}
        if not kinds:
            raise DataError(f"a turn of the {message['role']} must not be empty.")
        if message["role"] != "user" and kinds != {"text"}:
            raise DataError(f"only the user may show videos and images, but a turn of the {message['role']} does.")
