"""Conversations in several turns equal those that are read as a whole, and encode each medium once."""

import subprocess
from typing import Any

import numpy as np
import pytest
import torch

from model.mplug_owl_video import MplugOwlForConditionalGeneration, MplugOwlProcessor
from model.mplug_owl_video.chat import Chat
from tests.helpers.owl import CHECKPOINT, CLIP
from tests.helpers.paths import MPLUG

IMAGE = np.full((40, 60, 3), 200, dtype=np.uint8)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
Counted = tuple[Chat, list[torch.Size]]


@pytest.fixture
def counted() -> Counted:
    """A chat, and the shapes of what its vision model has read."""
    chat = Chat(
        MplugOwlForConditionalGeneration.from_pretrained(CHECKPOINT), MplugOwlProcessor.from_pretrained(CHECKPOINT)
    )
    seen: list[torch.Size] = []
    chat.model.vision_model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))
    return chat, seen


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": [*content]}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_every_turn_continues_the_whole_conversation(counted: Counted) -> None:
    chat, seen = counted
    processor, end = chat.processor, chat.processor.tokenizer.eos_token_id
    chat.show_video(CLIP)
    pieces: list[str] = []
    answer = chat.ask("什么在动？", pieces.append, **GREEDY)
    assert "".join(pieces).strip() == answer
    first = [said("user", {"type": "video", "video": CLIP}, text("什么在动？"))]
    inputs = processor.apply_chat_template(first)
    written = chat.model.generate(**inputs, **GREEDY)
    assert answer == processor.decode(written[0], skip_special_tokens=True).strip()

    # an end token follows the answer, and the second question is read as if it had been asked in one conversation
    second = [*inputs["input_ids"][0].tolist(), *written[0].tolist(), end]
    second += processor.encode("\nHuman: 什么颜色？\nAI: ")[1:]
    expected = chat.model.generate(torch.tensor([second]), video_pixel_values=inputs["video_pixel_values"], **GREEDY)
    answer = chat.ask("什么颜色？", lambda _: None, **GREEDY)
    assert answer == processor.decode(expected[0], skip_special_tokens=True).strip()
    assert sum(shape[0] for shape in seen) == 3  # the chat's, and one for each comparison


def test_images_and_videos_can_be_shown_in_any_turn(counted: Counted) -> None:
    chat, seen = counted
    chat.ask("hi", lambda _: None, **GREEDY)
    chat.show_image(IMAGE)
    chat.show_video(CLIP, num_frames=2)
    before = chat.embeddings
    chat.ask("compare", lambda _: None, **GREEDY)
    assert [tuple(shape[:3]) for shape in seen] == [(1, 3, 28), (1, 3, 2)]
    assert before is not None
    assert chat.embeddings is not None
    assert chat.embeddings.shape[1] > before.shape[1] + 2 * chat.model.config.media_length
    chat.reset()
    assert chat.embeddings is None


def test_a_stopped_answer_is_part_of_the_conversation(counted: Counted) -> None:
    chat, _ = counted

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("hi", stop, max_new_tokens=40, do_sample=False)
    assert chat.embeddings is not None
    length = chat.embeddings.shape[1]
    asked = len(chat.processor.encode_chat([said("user", text("hi"))]))
    assert asked < length < asked + 40
    chat.ask("again", lambda _: None, **GREEDY)
    assert chat.embeddings.shape[1] > length


def test_too_long_a_conversation_is_an_error(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, _ = counted
    monkeypatch.setattr(chat.model.config.text_config, "max_position_embeddings", 8, raising=False)
    with pytest.raises(ValueError, match="a conversation must have fewer than 8 tokens, but this one has"):
        chat.ask("hi", lambda _: None, **GREEDY)


def run(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([MPLUG, "chat", *arguments], input=typed, capture_output=True, text=True, check=False)


def test_the_command_answers_lines_of_a_pipe(decoder: str) -> None:
    typed = "什么在动？\n/video nothing.mp4\n\n/reset\n/unknown\nhi\n/quit\nnot read\n"
    ended = run(str(CHECKPOINT), str(CLIP), "--max-tokens", "4", typed=typed)
    assert ended.returncode == 0, ended.stderr
    assert "error: nothing.mp4 does not exist." in ended.stdout
    assert ended.stdout.count("/image PATH") == 1
    assert "Traceback" not in ended.stderr
    wrong = run(decoder)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].endswith("must be an mPLUG-Owl model, which can talk, but its type is gpt2.")
    short = run(str(CHECKPOINT), str(CLIP), "--num-frames", "1000")
    assert short.returncode == 3
    assert short.stderr.splitlines()[-1].startswith(
        "error: num_frames must be 1 to the 37 frames of the clip, got 1000"
    )
