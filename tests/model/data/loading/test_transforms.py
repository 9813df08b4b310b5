import random

import numpy as np
import pytest
import torch
from PIL import Image

from model.config.schema import DataConfig
from model.data.loading.transforms import FILL, OPERATIONS, crop_box, training_transform

PLAIN = DataConfig(crop_area=1.0, crop_relative=True, crop_aspect=(1, 1), flip_probability=0, augment_ops=0)


def noise(width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def clip(frames: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(noise())] * frames))


def test_without_augmentation_the_evaluation_resize_is_used() -> None:
    (found,) = training_transform(clip(), 32, PLAIN, random.Random(0)).numpy().astype(int)
    pillows = np.asarray(noise().resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - pillows).max() <= 2  # they round at different places
    assert np.abs(found - pillows).mean() < 0.05


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (320, 60)])
@pytest.mark.parametrize("relative", [False, True])
def test_crops_stay_inside_and_keep_area_and_aspect_ratio(size: tuple[int, int], relative: bool) -> None:
    config, rng = DataConfig(crop_relative=relative), random.Random(1)
    own = size[0] / size[1] if relative else 1
    boxes = [crop_box(*size, config, rng) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] + 1e-9
        assert 0 <= top < bottom <= size[1] + 1e-9
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) / own <= 4 / 3 + 1e-6
    areas = [(right - left) * (bottom - top) / (size[0] * size[1]) for left, top, right, bottom in boxes]
    if size == (320, 60) and not relative:  # no crop with half the area is so narrow, so it is always the central one
        assert {(box[1], box[3]) for box in boxes} == {(0, 60)}
    else:
        assert min(areas) > 0.499
        assert max(areas) - min(areas) > 0.3


def test_augmentation_is_equal_within_a_clip_and_differs_between_clips() -> None:
    first = training_transform(clip(2), 32, DataConfig(), random.Random(3))
    assert torch.equal(*first)
    assert not torch.equal(first[0], training_transform(clip(), 32, DataConfig(), random.Random(4))[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_symmetric_and_identity_at_strength_0(name: str) -> None:
    frame = noise()
    assert np.abs(np.asarray(OPERATIONS[name](frame, 0), int) - np.asarray(frame, int)).max() <= 1
    if name == "identity":
        return
    more, less = (np.asarray(OPERATIONS[name](frame, strength), int) for strength in (0.5, -0.5))
    assert np.abs(more - np.asarray(frame, int)).mean() > 1
    assert np.abs(more - less).mean() > 1


def test_enhancements_saturate_and_geometry_fills_with_grey() -> None:
    bright = np.asarray(OPERATIONS["brightness"](Image.new("RGB", (8, 8), (250, 3, 3)), 1.0))
    assert bright[0, 0].tolist() == [255, 5, 5]  # upstream wraps around
    shifted = np.asarray(OPERATIONS["translate_x"](noise(), 1.0))
    assert shifted[30, -1].tolist() == list(FILL)
