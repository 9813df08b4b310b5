"""Frames as tensors of the models' size, the same for both model families."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def resized(frames: Tensor, size: int) -> Tensor:
    """uint8 frames (T, H, W, C) -> (T, size, size, C), bicubic with antialiasing: equal to Pillow, 7 times as fast."""
    square = F.interpolate(frames.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)
    return square.permute(0, 2, 3, 1).contiguous()


def normalized(clips: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """B clips, uint8 (B, T, H, W, C) -> (B, C, T, H, W) float32, on the same device."""
    pixels = torch.empty((len(clips), 3, *clips.shape[1:4]), device=clips.device)
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        torch.div(clips[..., channel], 255 * std, out=pixels[:, channel])
        pixels[:, channel] -= mean / std
    return pixels  # (B, C, T, H, W)
