"""The processor: conversations with videos and images become model inputs. It is saved with the weights.

Prompt format, selection of frames and preprocessing are those of the original code.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil, PreTrainedTokenizerBase

from model import storage
from model.mplug_owl_video.configuration import MEDIA_IDS, MplugOwlConfig
from model.pixels import normalized, resized
from model.video import open_clip, open_image

SYSTEM = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PLACEHOLDERS = {"image": "<image>", "video": "<|video|>"}
PLACEHOLDER_IDS = {placeholder: MEDIA_IDS[kind] for kind, placeholder in PLACEHOLDERS.items()}
MEDIA = re.compile("(" + "|".join(map(re.escape, PLACEHOLDER_IDS)) + ")")
FILE = "preprocessor_config.json"
SPEAKERS = ("user", "assistant")
QUESTION, ANSWER = "Human: ", "AI: "
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
        self,
        image_processor: MplugOwlImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        media_length: int = 65,
        num_frames: int = 4,
        system: str = SYSTEM,
    ) -> None:
        """`media_length` is the number of positions of a video or an image: the model's queries, and an end vector.

        `num_frames` is the number of frames of a video and `system` the first sentence of a conversation, where a call
        gives no other.
        """
        self.image_processor, self.tokenizer, self.media_length = image_processor, tokenizer, media_length
        self.num_frames, self.system = num_frames, system

    @property
    def image_size(self) -> int:
        """Height and width of the model's frames, in pixels."""
        return int(self.image_processor.crop_size["height"])

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        num_frames: int | None = None,
        decoder: str = "pyav",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of `generate` for prompts that contain `<|video|>` and `<image>` where the media belong.

        Media are listed in reading order, those of the first prompt first. Shorter prompts are padded on the left.
        `decoder` is "pyav", or "decord" for pixels identical to those of the original code. Raises ValueError if the
        numbers of placeholders and media differ, or a video has fewer than `num_frames` frames.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        found = Counter(MEDIA.findall(" ".join(prompts)))
        for name, given in (("image", images), ("video", videos)):
            if found[PLACEHOLDERS[name]] != len(given):
                raise ValueError(
                    f"the text must contain one {PLACEHOLDERS[name]} per {name}, but it contains "
                    f"{found[PLACEHOLDERS[name]]} for {len(given)}."
                )
        rows = [self.encode(prompt) for prompt in prompts]
        return self._inputs(rows, images, videos, num_frames, decoder, return_tensors)

    def _inputs(
        self,
        rows: list[list[int]],
        images: Sequence[ImageSource],
        videos: Sequence[VideoSource],
        num_frames: int | None = None,
        decoder: str = "pyav",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be pt, got {return_tensors}.")
        inputs = self.pad(rows)
        if images:
            inputs["pixel_values"] = self.preprocess([read_image(image) for image in images])
        if videos:
            count = self.num_frames if num_frames is None else num_frames
            clips = [self.preprocess(sampled_frames(video, count, decoder)) for video in videos]
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
        with `system`. As in training, and unlike in the text, an end token follows each answer.
        """
        is_single = isinstance(conversation[0], Mapping)
        conversations = [conversation] if is_single else conversation
        if not tokenize:
            texts = [
                chat_text(messages, self.system, add_generation_prompt=add_generation_prompt)
                for messages in conversations
            ]
            return texts[0] if is_single else texts
        rows = [self.encode_chat(messages, add_generation_prompt=add_generation_prompt) for messages in conversations]
        media = [medium for messages in conversations for medium in media_of(messages)]
        images, videos = ([source for kind, source in media if kind == wanted] for wanted in ("image", "video"))
        return self._inputs(rows, images, videos, **options)

    def encode(self, prompt: str) -> list[int]:
        """Token IDs of a prompt, after the begin token. Each placeholder becomes a run of `media_length` media IDs."""
        return [self.tokenizer.bos_token_id, *chain.from_iterable(self._pieces(prompt))]

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token IDs of a conversation, with an end token after each answer."""
        ids = [self.tokenizer.bos_token_id]
        for text, is_answer in chat_pieces(messages, self.system, add_generation_prompt=add_generation_prompt):
            ids += [*chain.from_iterable(self._pieces(text)), *[self.tokenizer.eos_token_id] * is_answer]
        return ids

    def encode_answers(self, messages: Sequence[Message], max_length: int) -> tuple[list[int], list[bool]]:
        """At most `max_length` token IDs of a conversation, and which of them are answers, including their end tokens.

        The text between two answers is tokenised in one piece, like the prompt of the second one. A medium that does
        not fit entirely ends the row; the answer that does not fit is cut, and keeps its end token.
        """
        ids, are_answers = [self.tokenizer.bos_token_id], [False]
        for text, is_answer in chat_pieces(messages, self.system, add_generation_prompt=False):
            for piece in self._pieces(text):
                room = max_length - len(ids) - is_answer
                if room <= 0 or (piece[0] < 0 and len(piece) > room):
                    return ids, are_answers
                kept = piece[:room] + [self.tokenizer.eos_token_id] * is_answer
                ids += kept
                are_answers += [is_answer] * len(kept)
        return ids, are_answers

    def _pieces(self, text: str) -> Iterator[list[int]]:
        """Token IDs of the texts between media, and the runs of media IDs."""
        for piece in MEDIA.split(text):
            if piece in PLACEHOLDER_IDS:
                yield [PLACEHOLDER_IDS[piece]] * self.media_length
            elif piece:
                yield self.tokenizer(piece, add_special_tokens=False).input_ids

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

    def resize(self, frames: Tensor) -> Tensor:
        """Frames of a video, uint8 (T, H, W, C), as a square, without keeping the aspect ratio."""
        return resized(frames, self.image_size)

    def crop(self, frames: Tensor) -> Tensor:
        """Images, uint8 (n, H, W, C), resized to the shortest side and cut to the square in the centre."""
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        pixels: Tensor = self.image_processor(list(frames.numpy()), **options)["pixel_values"]
        return pixels.permute(0, 2, 3, 1)  # (n, H, W, C)

    def normalize(self, clips: Tensor) -> Tensor:
        """Clips of the model's size, uint8 (n, T, H, W, C) -> (n, C, T, H, W) float32, on the same device."""
        return normalized(clips, self.image_processor.image_mean, self.image_processor.image_std)

    def decode(self, token_ids: Any, **options: Any) -> str:
        return str(self.tokenizer.decode(token_ids, **options))

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        return list(self.tokenizer.batch_decode(sequences, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))
        settings = self.image_processor.to_dict() | {"num_frames": self.num_frames, "system": self.system}
        (Path(folder) / FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        length = MplugOwlConfig.from_pretrained(folder).media_length
        image_processor = MplugOwlImageProcessor.from_pretrained(folder)
        settings = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        own = {key: settings[key] for key in ("num_frames", "system") if key in settings}  # published files have none
        return cls(image_processor, AutoTokenizer.from_pretrained(str(folder)), length, **own)


def chat_text(messages: Sequence[Message], system: str, *, add_generation_prompt: bool) -> str:
    """The prompt of a conversation, one line per part. Each medium is a line of its speaker.

    It starts with the system message of the conversation, or with `system`.
    """
    return "".join(text for text, _ in chat_pieces(messages, system, add_generation_prompt=add_generation_prompt))


def chat_pieces(messages: Sequence[Message], system: str, *, add_generation_prompt: bool) -> Iterator[tuple[str, bool]]:
    """The text of a conversation in pieces, and which of them are answers."""
    lines = [] if messages[0]["role"] == "system" else [system]
    for number, message in enumerate(messages):
        role, parts = message["role"], _parts(message)
        if role not in SPEAKERS and (role != "system" or number):
            raise ValueError(f"role must be user or assistant, or system in the first message, got {role}.")
        texts = [text if kind == "text" else PLACEHOLDERS[kind] for kind, text in parts]
        if role == "assistant":
            yield "\n".join([*lines, ANSWER]), False
            yield "\n".join(texts), True
            lines = [""]
        else:
            lines += [f"{QUESTION}{text}" if role == "user" else text for text in texts]
    if add_generation_prompt:
        lines.append(ANSWER)
    if lines != [""]:
        yield "\n".join(lines), False


def media_of(messages: Iterable[Message]) -> list[tuple[str, Any]]:
    """The media of a conversation in reading order, with their kinds."""
    return [part for message in messages for part in _parts(message) if part[0] in PLACEHOLDERS]


def _parts(message: Message) -> list[tuple[str, Any]]:
    content = message["content"]
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type")
        if kind not in ("text", *PLACEHOLDERS):
            raise ValueError(f"the type of a part must be text, video or image, got {kind}.")
        if kind not in part and "path" not in part:
            raise ValueError(f"a part of type {kind} must have the key {kind}, but it has {', '.join(part)}.")
        source = part[kind] if kind in part else part["path"]
        if kind == "text" and (tag := MEDIA.search(source)):
            raise ValueError(f"a text must not contain {tag[0]}: a video or an image must be a separate part.")
        parts.append((kind, source))
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


def read_image(image: ImageSource) -> Frame:
    if isinstance(image, str | Path):
        image = storage.read(str(image))
    return open_image(image) if isinstance(image, bytes) else image
