"""The training transform: a random crop, flip and augmentation, the same for all frames of a clip."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from model.config.schema import DataConfig
from model.pixels import resized

Operation = Callable[[Image.Image, float], Image.Image]

CROP_ATTEMPTS = 10
FILL = (128, 128, 128)
"""Colour of the area that a geometric operation uncovers."""
MAX_SHEAR, MAX_SHIFT, MAX_ANGLE, MAX_ENHANCEMENT = 0.3, 10 / 224, 30.0, 0.9
"""Strength at level 10: tangent of a shear, share of the side, degrees, difference of an enhancement factor from 1."""


def training_transform(frames: Tensor, size: int, config: DataConfig, rng: random.Random) -> Tensor:
    """Frames of any size (T, H, W, C) -> (T, size, size, C), uint8. All randomness comes from `rng`, once per clip.

    As in the original code: a random resized crop, a flip, then `augment_ops` different operations at `augment_level`.
    Three bugs of the original are fixed: pixel values do not wrap around, enhancements have an effect, and geometric
    operations go in both directions.
    """
    left, top, right, bottom = (round(edge) for edge in crop_box(frames.shape[2], frames.shape[1], config, rng))
    clip = resized(frames[:, top : max(bottom, top + 1), left : max(right, left + 1)], size)
    if rng.random() < config.flip_probability:
        clip = clip.flip(2)
    changes = [
        (name, rng.choice((-1, 1)) * config.augment_level / 10)
        for name in rng.sample(list(OPERATIONS), config.augment_ops)
    ]
    return torch.from_numpy(np.stack([_changed(frame, changes) for frame in clip.numpy()])) if changes else clip


def _changed(frame: NDArray[np.uint8], changes: list[tuple[str, float]]) -> NDArray[np.uint8]:
    image = Image.fromarray(frame)
    for name, strength in changes:
        image = OPERATIONS[name](image, strength)
    return np.asarray(image)


def crop_box(width: int, height: int, config: DataConfig, rng: random.Random) -> tuple[float, float, float, float]:
    """(left, top, right, bottom): at least `crop_area` of the area, with a log-uniform aspect ratio.

    If no sampled crop fits, the largest central crop with an allowed aspect ratio.
    """
    own = width / height if config.crop_relative else 1.0
    narrowest, widest = (bound * own for bound in config.crop_aspect)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(config.crop_area, 1)
        aspect = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    aspect = min(max(width / height, narrowest), widest)
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _shifted(frame: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return frame.transform(
        frame.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _enhancement(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda frame, strength: kind(frame).enhance(1 + MAX_ENHANCEMENT * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda frame, _: frame,
    "contrast": _enhancement(ImageEnhance.Contrast),
    "brightness": _enhancement(ImageEnhance.Brightness),
    "sharpness": _enhancement(ImageEnhance.Sharpness),
    "shear_x": lambda frame, strength: _shifted(frame, (1, MAX_SHEAR * strength, 0, 0, 1, 0)),
    "shear_y": lambda frame, strength: _shifted(frame, (1, 0, 0, MAX_SHEAR * strength, 1, 0)),
    "translate_x": lambda frame, strength: _shifted(frame, (1, 0, MAX_SHIFT * frame.width * strength, 0, 1, 0)),
    "translate_y": lambda frame, strength: _shifted(frame, (1, 0, 0, 0, 1, MAX_SHIFT * frame.height * strength)),
    "rotate": lambda frame, strength: frame.rotate(
        MAX_ANGLE * strength, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    ),
}
"""Frame and strength from -1 to 1 -> frame. The nine operations of the original code (arXiv 1909.13719)."""
