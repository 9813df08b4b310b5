"""Decodes frames of a clip. The only file that imports a decoder (decord).

Frame choice follows upstream: the clip is cut into equal intervals and one frame is taken from each, the middle one
for evaluation, a random one for training.
"""

import io
import random
from dataclasses import dataclass
from itertools import pairwise

import decord
import numpy as np
from PIL import Image


class VideoError(ValueError):
    """A clip that cannot be decoded; the message is its reason in the quarantine list."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Decoded frames and what the container says about the whole."""

    frames: list[Image.Image]
    num_frames: int
    """Frames of the source clip."""
    fps: float
    width: int
    height: int


def decode(data: bytes, num_frames: int) -> Clip:
    """Decodes `num_frames` uniformly spaced frames (fewer where the clip is shorter) of an encoded clip."""
    if not data:
        raise VideoError("the file is empty")
    try:
        # one thread: parallelism comes from processes, and a decoder's own threads would fight over the cores
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        indices = frame_indices(len(reader), num_frames)
        frames = reader.get_batch(indices).asnumpy()  # (T, H, W, C)
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(" ".join(str(error).split())[:200]) from error
    return Clip(
        frames=[Image.fromarray(frame) for frame in frames],
        num_frames=len(reader),
        fps=float(reader.get_avg_fps()),
        width=frames.shape[2],
        height=frames.shape[1],
    )


def frame_indices(length: int, num_frames: int, rng: random.Random | None = None) -> list[int]:
    """One frame index per interval: the middle, or a random one where `rng` is given.

    Without `rng`, a clip shorter than `num_frames` gives all its frames once; see `padded`.
    """
    bounds = np.linspace(0, length, min(num_frames, length) + 1).astype(int)
    intervals = [(int(low), int(high) - 1) for low, high in pairwise(bounds)]
    if rng is None:
        return [(low + high) // 2 for low, high in intervals]
    return [rng.randint(low, high) for low, high in intervals]


def padded(indices: list[int], num_frames: int) -> list[int]:
    """Repeats the last frame of a short clip, as upstream does."""
    return indices + indices[-1:] * (num_frames - len(indices))
