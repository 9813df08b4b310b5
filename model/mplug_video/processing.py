"""The processor: frames become normalised tensors, texts become token IDs. It is saved with the weights."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.mplug_video import configuration  # noqa: F401  # AutoTokenizer must know the model type
from model.mplug_video.tokenization import encode_choices, encode_pair, encode_sentence
from model.pixels import MEAN, STD, normalized, resized

FILE = "preprocessor_config.json"
Frame = Image.Image | NDArray[np.uint8]
"""RGB, (H, W, C)."""


class MPlugVideoProcessor:
    """Converts frames and texts into model inputs, in the same way for training, evaluation and serving."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_size: int,
        num_frames: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        resample: str = "bicubic",
    ) -> None:
        """`resample` is "bicubic" as in training, or "nearest" as in the evaluation of the released models."""
        if resample not in ("bicubic", "nearest"):
            raise ValueError(f"resample must be bicubic or nearest, got {resample}.")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_frames = num_frames
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.resample = resample

    def clip(self, frames: Tensor | Sequence[Frame]) -> Tensor:
        """T frames of any size, uint8 (T, H, W, C) -> model input (C, T, H, W), float32."""
        pixels = frames if isinstance(frames, Tensor) else torch.from_numpy(np.stack([np.asarray(f) for f in frames]))
        return self.normalize(self.resize(pixels)[None])[0]

    def resize(self, frames: Tensor) -> Tensor:
        """Resizes frames (T, H, W, C) to the model's square, without keeping the aspect ratio.

        If a clip has fewer frames than the model reads, its last frame is repeated.
        """
        if len(frames) < self.num_frames:
            frames = torch.cat([frames, frames[-1:].expand(self.num_frames - len(frames), -1, -1, -1)])
        return (resized if self.resample == "bicubic" else _nearest)(frames, self.image_size)

    def normalize(self, clips: Tensor) -> Tensor:
        """B clips of the model's size, uint8 (B, T, H, W, C) -> (B, C, T, H, W) float32, on the same device."""
        return normalized(clips, self.mean, self.std)

    def texts(self, texts: Sequence[str], max_length: int = 80) -> tuple[Tensor, Tensor]:
        """Token IDs and attention mask (B, L) of sentences, with begin and end tokens."""
        return self.pad(self.sentences(texts, max_length))

    def sentences(self, texts: Sequence[str], max_length: int = 80) -> list[list[int]]:
        """Token IDs of sentences, with begin and end tokens."""
        return [encode_sentence(self.tokenizer, text, max_length) for text in texts]

    def pairs(self, pairs: Iterable[tuple[str, str]], max_length: int = 80) -> tuple[Tensor, Tensor]:
        """Token IDs (B, L) of (prompt, answer) pairs, and the loss mask (B, L - 1) of the answers."""
        encoded = [encode_pair(self.tokenizer, *pair, max_length) for pair in pairs]
        ids, mask = self.pad([row for row, _ in encoded])
        return ids, answer_mask(mask, [prompt_length for _, prompt_length in encoded])

    def choices(self, prompt: str, answers: list[str], max_length: int = 80) -> tuple[list[list[int]], list[int]]:
        """Token IDs of a prompt with each of N answers, and in each the number of the answer's first token."""
        rows, lengths = encode_choices(self.tokenizer, prompt, answers, max_length)
        return rows, [length + 1 for length in lengths]

    def pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Token IDs and attention mask (B, L), padded on the right to the longest row."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self.tokenizer.pad_token_id)
        return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)

    def begin(self, clips: int) -> Tensor:
        """The prompt (B, 1) of captions, which is only the begin token."""
        return torch.full((clips, 1), self.tokenizer.bos_token_id)

    def captions(self, written: Tensor) -> list[str]:
        """The texts of generated token IDs (B, new), without spaces, as Chinese is written."""
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.replace(" ", "").strip() for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(str(folder))
        settings = {
            "processor_class": type(self).__name__,
            "image_size": self.image_size,
            "num_frames": self.num_frames,
            "mean": self.mean,
            "std": self.std,
            "resample": self.resample,
        }
        (Path(folder) / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        settings = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
        settings.pop("processor_class")
        return cls(AutoTokenizer.from_pretrained(str(folder)), **settings)


def _nearest(frames: Tensor, size: int) -> Tensor:
    """Pixel i of the result is pixel floor(i · scale), as in OpenCV. Pillow takes the pixel at the centre."""
    rows, columns = (torch.arange(size) * side // size for side in frames.shape[1:3])
    return frames[:, rows[:, None], columns]


def answer_mask(attention_mask: Tensor, prompt_lengths: list[int]) -> Tensor:
    """Loss mask (B, L - 1) of the tokens after the prompt: column j is the loss of token j + 1."""
    mask = attention_mask[:, 1:].clone()
    for row, length in enumerate(prompt_lengths):
        mask[row, :length] = 0
    return mask


def clean_caption(text: str, max_words: int) -> str:
    """The cleaning of the original code: lower case, no ASCII punctuation, single spaces, at most `max_words` words.

    Full-width Chinese punctuation is kept.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
