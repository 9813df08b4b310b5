"""Floating-point operations of a training step, from shapes alone; two per multiplication and addition.

Only matrix products count, as in every published MFU; activations that are made again in the backward pass do not.
B clips, T frames, N patches, K queries, L tokens, D width. Held against torch's own counter in the tests.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.tasks.base import DecoderPass


@dataclass(frozen=True)
class Gpu:
    """As vendors state it."""

    memory: float
    """Bytes."""
    bf16_peak: float
    """Operations per second in bf16, without sparsity."""


GPUS = {
    "B200": Gpu(180e9, 2250e12), "H200": Gpu(141e9, 989e12), "H100": Gpu(80e9, 989e12), "A100": Gpu(80e9, 312e12),
    "L40S": Gpu(48e9, 362e12), "A10G": Gpu(24e9, 70e12),
}  # fmt: skip
"""By a part of the device's name."""


@dataclass(frozen=True)
class Flops:
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times)


def product(rows: float, inner: float, columns: float, *, to_input: bool = True, to_weight: bool = True) -> Flops:
    """rows x inner times inner x columns, and the products that its gradients take."""
    forward = 2 * rows * inner * columns
    return Flops(forward, forward * (to_input + to_weight))


def attention(rows: float, queries: float, keys: float, width: float, *, backward: bool = True) -> Flops:
    """Scores and their use as weights, all heads together; a causal one counts as a whole one."""
    return product(rows * queries, width, 2 * keys, to_input=backward, to_weight=backward)


def of_vision(config: TimeSformerConfig, clips: int, *, spatial: bool = True) -> Flops:
    """TimeSformer; `spatial` is False where only what reads over time is trained."""
    width, frames = config.hidden_size, config.num_frames
    patches = (config.image_size // config.patch_size) ** 2
    over_time, over_space = clips * patches * frames, clips * frames * (1 + patches)
    tokens = clips * (1 + frames * patches)
    block = product(over_time, width, 4 * width) + attention(clips * patches, frames, frames, width)
    block += product(width, width, width)  # the temporal output projection and temporal_fc become one layer
    block += product(over_space, width, 4 * width, to_weight=spatial)
    block += attention(clips * frames, 1 + patches, 1 + patches, width)
    block += product(tokens, width, 2 * config.mlp_ratio * width, to_weight=spatial)
    stem = product(over_time, 3 * config.patch_size**2, width, to_input=False, to_weight=spatial)
    return stem + block * config.num_hidden_layers


def of_abstractor(config: MPlugVideoConfig, clips: int) -> Flops:
    """Queries read all visual tokens, and become the prefix."""
    vision = config.vision_config
    width, queries = vision.hidden_size, clips * config.num_queries
    keys = 1 + vision.num_frames * (vision.image_size // vision.patch_size) ** 2
    found = product(queries, width, 2 * width) + product(clips * keys, width, 2 * width)
    found += attention(clips, config.num_queries, keys + 1, width)  # and one learned key
    found += product(queries, width, 2 * vision.mlp_ratio * width)
    return found + product(queries, width, config.text_config.hidden_size)


def of_decoder(decoder: PreTrainedModel, read: DecoderPass, *, frozen: bool) -> Flops:
    """One pass over texts, with logits where a loss is taken."""
    config, tokens = decoder.config, read.rows * read.length
    layers = sum(
        math.prod(shape)
        for module in decoder.base_model.modules()
        for weight in ([] if isinstance(module, nn.Embedding) else module.parameters(recurse=False))
        if len(shape := getattr(weight, "ds_shape", weight.shape)) == 2  # ZeRO-3 keeps only a part of it
    )
    gradient = {"to_input": read.after_prefix or not frozen, "to_weight": not frozen}
    found = product(tokens, layers, 1, **gradient)
    attended = attention(read.rows, read.length, read.length, config.hidden_size, backward=gradient["to_input"])
    found += attended * config.num_hidden_layers
    return found + product(read.scored, config.hidden_size, config.vocab_size, **gradient)


def step_flops(model: PreTrainedModel, clips: int, passes: list[DecoderPass]) -> Flops:
    """Forward and backward pass of a task's model over a batch. Heads of a few thousand weights are left out."""
    config = model.config
    if not isinstance(config, MPlugVideoConfig):  # the decoder alone
        return sum((of_decoder(model, read, frozen=False) for read in passes), Flops())
    found = of_vision(config.vision_config, clips, spatial=not config.freeze_vision)
    if any(read.after_prefix for read in passes):
        found += of_abstractor(config, clips)
    return sum((of_decoder(model.decoder, read, frozen=config.freeze_decoder) for read in passes), found)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that the device can do: the vendor's figure, or what a large product reaches here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [gpu.bf16_peak for part, gpu in GPUS.items() if part in name]
        if known:
            return known[0]
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    left = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s
