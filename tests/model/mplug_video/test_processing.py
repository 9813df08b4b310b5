from pathlib import Path

import pytest
import torch
from PIL import Image

from model.mplug_video import MPlugVideoProcessor
from model.mplug_video.tokenization import load_tokenizer
from tests.helpers.upstream import GPT3, Recording

RECORDING = Recording("data_pipeline")
FRAMES = [Image.fromarray(frame.numpy()) for frame in RECORDING["in/frames_uint8"]]


def processor(**settings: object) -> MPlugVideoProcessor:
    tokenizer = load_tokenizer(GPT3 / "tokenizer.json")
    return MPlugVideoProcessor(tokenizer, image_size=16, num_frames=len(FRAMES), **settings)


def test_released_models_use_nearest_resampling(tmp_path: Path) -> None:
    processor(resample="nearest").save_pretrained(tmp_path)
    loaded = MPlugVideoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.clip(FRAMES), RECORDING["out/test_transform"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="resample must be bicubic or nearest"):
        processor(resample="lanczos")


def test_new_models_use_bicubic_resampling() -> None:
    plain = torch.nn.functional.interpolate(
        RECORDING["in/frames_uint8"].permute(0, 3, 1, 2).float(), size=(16, 16), mode="bicubic", antialias=True
    )
    expected = (plain.clamp(0, 255).round() / 255).permute(1, 0, 2, 3)  # (C, T, H, W)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (processor().mean, processor().std))
    # Pillow rounds between its two passes
    assert ((processor().clip(FRAMES) * std + mean) - expected).abs().mean() < 1 / 255
