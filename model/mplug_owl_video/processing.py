"""The processor: conversations with videos and images become model inputs. It is saved with the weights.

Prompt format, selection of frames and preprocessing are those of the original code.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase

from model import storage
from model.mplug_owl_video.configuration import IMAGE_ID, VIDEO_ID, MplugOwlConfig
from model.video import open_clip

SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PLACEHOLDERS = {"image": "<image>", "video": "<|video|>"}
MEDIA_IDS = {PLACEHOLDERS["image"]: IMAGE_ID, PLACEHOLDERS["video"]: VIDEO_ID}
MEDIA = re.compile("(" + "|".join(map(re.escape, MEDIA_IDS)) + ")")
SPEAKERS = {"user": "Human", "assistant": "AI"}
DECODED_SIDE = 224
"""The original code lets the decoder scale frames to this square, before the image processor."""

Frame = Image.Image | NDArray[np.uint8]
"""RGB, (H, W, C)."""
VideoSource = str | Path | bytes | Sequence[Frame] | NDArray[np.uint8]
"""A file, its content, or its frames."""
ImageSource = str | Path | bytes | Frame
Message = Mapping[str, Any]
"""{"role": "system", "user" or "assistant", "content": a text or a list of parts}. A part is {"type": "text", "text":
…}, or {"type": "video", "video": …} and the same with "image"; the key of a medium may be "path" as well."""


class MplugOwlImageProcessor(CLIPImageProcessorPil):
    """CLIP's preprocessing: shortest side resized bicubically, the centre cut out, normalised."""


class MplugOwlProcessor:
    """Converts texts, videos and images into model inputs, in the same way for training, evaluation and serving."""

    def __init__(
        self, image_processor: MplugOwlImageProcessor, tokenizer: PreTrainedTokenizerBase, media_length: int = 65
    ) -> None:
        """`media_length` is the number of positions of a video or an image: the model's queries, and an end vector."""
        self.image_processor, self.tokenizer, self.media_length = image_processor, tokenizer, media_length

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        num_frames: int = 4,
        decoder: str = "pyav",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of `generate` for prompts that contain `<|video|>` and `<image>` where the media belong.

        Media are listed in reading order, those of the first prompt first. Shorter prompts are padded on the left.
        `decoder` is "pyav", or "decord" for pixels identical to those of the original code. Raises ValueError if the
        numbers of placeholders and media differ, or a video has fewer than `num_frames` frames.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be pt, got {return_tensors}.")
        prompts = [text] if isinstance(text, str) else list(text)
        found = Counter(MEDIA.findall(" ".join(prompts)))
        for name, given in (("image", images), ("video", videos)):
            if found[PLACEHOLDERS[name]] != len(given):
                raise ValueError(
                    f"the text must contain one {PLACEHOLDERS[name]} per {name}, but it contains "
                    f"{found[PLACEHOLDERS[name]]} for {len(given)}."
                )
        inputs = self.pad([self.encode(prompt) for prompt in prompts])
        if images:
            inputs["pixel_values"] = self.preprocess([_read_image(image) for image in images])
        if videos:
            clips = [self.preprocess(sampled_frames(video, num_frames, decoder)) for video in videos]
            inputs["video_pixel_values"] = torch.stack(clips).transpose(1, 2)  # (n, C, T, H, W)
        return BatchFeature(inputs)

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **options: Any,
    ) -> BatchFeature | str | list[str]:
        """Inputs of `generate` for a conversation, a list of messages, or for several; without `tokenize` their texts.

        `options` are num_frames, decoder and return_tensors as above. A conversation without a system message starts
        with the system sentence of the original code.
        """
        is_single = isinstance(conversation[0], Mapping)
        texts, images, videos = list[str](), list[ImageSource](), list[VideoSource]()
        for messages in [conversation] if is_single else conversation:
            texts.append(chat_text(messages, add_generation_prompt=add_generation_prompt))
            for kind, media in media_of(messages):
                (images if kind == "image" else videos).append(media)
        if not tokenize:
            return texts[0] if is_single else texts
        return self(texts, images, videos, **options)

    def encode(self, prompt: str) -> list[int]:
        """Token IDs of a prompt, after the begin token. Each placeholder becomes a run of `media_length` media IDs."""
        ids = [self.tokenizer.bos_token_id]
        for piece in MEDIA.split(prompt):
            if piece in MEDIA_IDS:
                ids += [MEDIA_IDS[piece]] * self.media_length
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids

    def pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Token IDs and attention mask (B, L), padded on the left to the longest row."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def preprocess(self, frames: Sequence[Frame]) -> Tensor:
        """Normalised pixels (T, C, H, W), float32."""
        pixels: Tensor = self.image_processor(list(frames), return_tensors="pt")["pixel_values"]
        return pixels

    def decode(self, token_ids: Any, **options: Any) -> str:
        return str(self.tokenizer.decode(token_ids, **options))

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        return list(self.tokenizer.batch_decode(sequences, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))
        self.image_processor.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        length = MplugOwlConfig.from_pretrained(folder).media_length
        image_processor = MplugOwlImageProcessor.from_pretrained(folder)
        return cls(image_processor, AutoTokenizer.from_pretrained(str(folder)), length)


def chat_text(messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The prompt of a conversation, one line per part. Each medium is a line of its speaker."""
    lines = [] if messages[0]["role"] == "system" else [SYSTEM]
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in SPEAKERS and (role != "system" or number):
            raise ValueError(f"role must be user or assistant, or system in the first message, got {role}.")
        speaker = f"{SPEAKERS[role]}: " if role in SPEAKERS else ""
        lines += [speaker + (text if kind == "text" else PLACEHOLDERS[kind]) for kind, text in _parts(message)]
    return "\n".join([*lines, "AI: "] if add_generation_prompt else lines)


def media_of(messages: Iterable[Message]) -> list[tuple[str, Any]]:
    """The media of a conversation in reading order, with their kinds."""
    return [part for message in messages for part in _parts(message) if part[0] in PLACEHOLDERS]


def _parts(message: Message) -> list[tuple[str, Any]]:
    content = message["content"]
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", *PLACEHOLDERS):
            raise ValueError(f"the type of a part must be text, video or image, got {kind}.")
        if kind not in part and "path" not in part:
            raise ValueError(f"a part of type {kind} must have the key {kind}, but it has {', '.join(part)}.")
        parts.append((kind, part[kind] if kind in part else part["path"]))
    return parts


def uniform_indices(length: int, num_frames: int) -> list[int]:
    """Uniformly spaced frames of a clip of `length` frames, as in the original code."""
    if length < num_frames or num_frames < 1:
        raise ValueError(f"num_frames must be 1 to the {length} frames of the clip, got {num_frames}.")
    step = (length - 1) / num_frames
    return [int(step / 2) + round(step * number) for number in range(num_frames)]


def sampled_frames(video: VideoSource, num_frames: int, decoder: str) -> list[Frame]:
    """`num_frames` uniformly spaced frames."""
    if isinstance(video, str | Path):
        video = storage.read(str(video))
    if not isinstance(video, bytes):
        return [video[index] for index in uniform_indices(len(video), num_frames)]
    reader = open_clip(video, decoder, side=DECODED_SIDE)
    return list(reader.frames(uniform_indices(reader.num_frames, num_frames)))


def _read_image(image: ImageSource) -> Frame:
    if isinstance(image, str | Path):
        image = storage.read(str(image))
    return Image.open(BytesIO(image)).convert("RGB") if isinstance(image, bytes) else image
