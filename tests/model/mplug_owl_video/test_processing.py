"""Prompts, media and chat templates: the original's where it is right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from model.mplug_owl_video import MplugOwlImageProcessor, MplugOwlProcessor
from model.mplug_owl_video.processing import SYSTEM, uniform_indices
from model.video import VideoError, open_clip
from tests.helpers.owl import CHECKPOINT, CLIP, OwlRecording, prompts

RECORDED = OwlRecording("processor")
PROMPTS = prompts()
IMAGE = Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8))


@pytest.fixture(scope="module")
def processor() -> MplugOwlProcessor:
    settings = RECORDED.facts["preprocessor_config_small"]
    return MplugOwlProcessor(MplugOwlImageProcessor(**settings), AutoTokenizer.from_pretrained(str(CHECKPOINT)))


@pytest.mark.parametrize("name", RECORDED.facts["prompt_ids"])
def test_token_ids_of_prompts(processor: MplugOwlProcessor, name: str) -> None:
    expected = RECORDED.facts["prompt_ids"][name]["input_ids"]
    assert processor.encode(PROMPTS[name]) == expected
    assert name != "adjacent" or expected.count(-2) == 130  # two videos, although they form one run


def test_frame_indices() -> None:
    for row in RECORDED.facts["get_index_table"]:
        if row["segments"] <= row["total"]:
            assert uniform_indices(row["total"], row["segments"]) == row["indices"]
        else:  # the original code repeats frames
            with pytest.raises(ValueError, match=f"num_frames must be 1 to the {row['total']} frames of the clip"):
                uniform_indices(row["total"], row["segments"])


def test_pixels_of_images(processor: MplugOwlProcessor) -> None:
    frames = RECORDED["in/stack/frames_uint8"].numpy()
    assert torch.equal(processor.preprocess(list(frames)), RECORDED["out/stack/pixel_values_small"])


@pytest.mark.parametrize("num_frames", [4, 8])
def test_pixels_of_videos(processor: MplugOwlProcessor, num_frames: int) -> None:
    expected = RECORDED[f"out/mp4/nf{num_frames}/video_pixel_values_small"]
    ours = processor(PROMPTS["readme_zh"], videos=[CLIP], num_frames=num_frames, decoder="decord")
    assert torch.equal(ours["video_pixel_values"], expected)
    ours = processor(PROMPTS["readme_zh"], videos=[CLIP.read_bytes()], num_frames=num_frames)
    assert (ours["video_pixel_values"] - expected).abs().mean() < 0.01  # 0.006 measured, of values around 1


def test_both_decoders_scale_to_the_same_square() -> None:
    clips = [
        np.stack(list(open_clip(CLIP.read_bytes(), decoder, side=96).frames([0, 18, 36])))
        for decoder in ("pyav", "decord")
    ]
    assert clips[0].shape == clips[1].shape == (3, 96, 96, 3)
    assert np.abs(clips[0].astype(int) - clips[1]).mean() < 1


def test_videos_and_images_in_any_order(processor: MplugOwlProcessor) -> None:
    text = ["<|video|><|video|>\nHuman: a\nAI: ", "<image>\nHuman: <|video|>\nHuman: b\nAI: ", "Human: c\nAI: "]
    frames = list(np.zeros((5, 20, 20, 3), dtype=np.uint8))
    inputs = processor(text, images=[IMAGE], videos=[CLIP, frames, CLIP])
    assert inputs["video_pixel_values"].shape == (3, 3, 4, 42, 42)
    assert inputs["pixel_values"].shape == (1, 3, 42, 42)
    assert (inputs["input_ids"] == -2).sum(dim=1).tolist() == [130, 65, 0]
    assert (inputs["input_ids"] == -1).sum(dim=1).tolist() == [0, 65, 0]
    clips = inputs["video_pixel_values"]
    assert torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0], clips[1])


def test_shorter_prompts_are_padded_on_the_left(processor: MplugOwlProcessor) -> None:
    inputs = processor([PROMPTS["readme_en"], PROMPTS["text_only"]], videos=[CLIP])
    short = processor.encode(PROMPTS["text_only"])
    padding = inputs["input_ids"].shape[1] - len(short)
    assert inputs["input_ids"][1].tolist() == [3] * padding + short
    assert inputs["attention_mask"][1].tolist() == [0] * padding + [1] * len(short)
    assert inputs["attention_mask"].dtype == torch.int64


def test_a_single_string_is_one_prompt(processor: MplugOwlProcessor) -> None:
    single, batch = processor(PROMPTS["text_only"]), processor([PROMPTS["text_only"]])
    assert torch.equal(single["input_ids"], batch["input_ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "<|video|> AI: "}, r"one <\|video\|> per video, but it contains 1 for 0"),
        ({"text": "AI: ", "videos": [CLIP]}, "it contains 0 for 1"),
        ({"text": "<image><image>", "images": [IMAGE]}, "one <image> per image, but it contains 2 for 1"),
        ({"text": "<|video|>", "videos": [CLIP], "num_frames": 60}, "1 to the 37 frames of the clip, got 60"),
        ({"text": "<|video|>", "videos": [CLIP], "num_frames": 0}, "got 0"),
        ({"text": "<|video|>", "videos": [b"not a video"]}, "not_a_video"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors must be pt, got np"),
    ],
)
def test_wrong_inputs_are_named(processor: MplugOwlProcessor, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, VideoError), match=message):
        processor(**options)


def asked(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts],
    }


def answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


VIDEO_PART, IMAGE_PART = {"type": "video", "video": CLIP}, {"type": "image", "path": IMAGE}
CONVERSATIONS = {
    "readme_zh": [asked(VIDEO_PART, "视频中的女人在干什么？")],
    "multi_turn": [
        asked(VIDEO_PART, "What is the woman doing in the video?"),
        answered("She is dancing."),
        {"role": "user", "content": "为什么？"},
    ],
    "image": [asked(IMAGE_PART, "Explain why this meme is funny.")],
    "image_and_video": [asked(IMAGE_PART, VIDEO_PART, "比较")],
    "text_only": [{"role": "system", "content": SYSTEM}, asked("Hello")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template(processor: MplugOwlProcessor, name: str) -> None:
    assert processor.apply_chat_template(CONVERSATIONS[name], tokenize=False) == PROMPTS[name]


def test_chat_template_of_a_batch_with_its_media(processor: MplugOwlProcessor) -> None:
    names = ["image_and_video", "text_only", "readme_zh"]
    inputs = processor.apply_chat_template([CONVERSATIONS[name] for name in names], num_frames=2)
    expected = processor([PROMPTS[name] for name in names], images=[IMAGE], videos=[CLIP, CLIP], num_frames=2)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_an_end_token_follows_each_earlier_answer(processor: MplugOwlProcessor) -> None:
    (ids,) = processor.apply_chat_template(CONVERSATIONS["multi_turn"]).input_ids.tolist()
    before, answer, after = PROMPTS["multi_turn"].partition("She is dancing.")
    end = processor.tokenizer.eos_token_id
    assert ids == [*processor.encode(before + answer), end, *processor.encode(after)[1:]]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "a"}, "role must be user or assistant, or system in the first message, got tool"),
        (asked({"type": "audio", "audio": "a"}), "must be text, video or image, got audio"),
        (asked({"type": "video", "url": "a"}), "a part of type video must have the key video"),
        ({"role": "user", "content": "what is <image>?"}, "a text must not contain <image>"),
    ],
)
def test_wrong_messages_are_named(processor: MplugOwlProcessor, message: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        processor.apply_chat_template([message])


def test_a_saved_processor_is_the_same(processor: MplugOwlProcessor, tmp_path: Path) -> None:
    published = MplugOwlProcessor.from_pretrained(CHECKPOINT)
    published.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    again = MplugOwlProcessor.from_pretrained(tmp_path)
    options: dict[str, Any] = {"text": PROMPTS["readme_zh"], "videos": [CLIP]}
    before, after = published(**options), again(**options)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 28}


def test_decoding(processor: MplugOwlProcessor) -> None:
    facts = RECORDED.facts["decode"]
    assert processor.decode(facts["ids"], skip_special_tokens=True) == facts["decode(token_ids=ids)"]
    ids: Tensor = torch.tensor([facts["ids"]])
    assert processor.batch_decode(ids, skip_special_tokens=True) == facts["batch_decode(sequences=[ids])"]
