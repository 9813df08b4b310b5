"""Floating-point operations of a training step, computed from shapes; a multiply-add counts as two.

As in published MFU figures, only matrix products count, and recomputed activations do not. The tests compare the result
with torch's counter. B clips, T frames, N patches, K queries, L tokens, D width.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from model.mplug_owl_video.configuration import MplugOwlConfig, MplugOwlVisionConfig
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.tasks.base import DecoderPass, Task, VisionPass


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values of a GPU."""

    memory: float
    """Bytes."""
    bf16_peak: float
    """Peak operations per second in bf16, without sparsity."""


GPUS = {
    "B200": Gpu(180e9, 2250e12),
    "H200": Gpu(141e9, 989e12),
    "H100": Gpu(80e9, 989e12),
    "A100": Gpu(80e9, 312e12),
    "L40S": Gpu(48e9, 362e12),
    "A10G": Gpu(24e9, 70e12),
}
"""Data sheet values by a part of the device name."""


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


def matmul_flops(rows: float, inner: float, columns: float, *, to_input: bool = True, to_weight: bool = True) -> Flops:
    """A matrix product, (rows, inner) times (inner, columns), and the products of its gradients."""
    forward = 2 * rows * inner * columns
    return Flops(forward, forward * (to_input + to_weight))


def attention_flops(rows: float, queries: float, keys: float, width: float, *, backward: bool = True) -> Flops:
    """Attention scores and weighted sums of all heads. Causal attention counts like full attention."""
    return matmul_flops(rows * queries, width, 2 * keys, to_input=backward, to_weight=backward)


def vision_flops(config: TimeSformerConfig, clips: int, *, spatial: bool = True) -> Flops:
    """TimeSformer. `spatial` is False if only its temporal parts are trained."""
    width, frames = config.hidden_size, config.num_frames
    patches = (config.image_size // config.patch_size) ** 2
    over_time, over_space = clips * patches * frames, clips * frames * (1 + patches)
    tokens = clips * (1 + frames * patches)
    block = matmul_flops(over_time, width, 4 * width) + attention_flops(clips * patches, frames, frames, width)
    block += matmul_flops(width, width, width)  # merges the temporal output projection and temporal_fc into one layer
    block += matmul_flops(over_space, width, 4 * width, to_weight=spatial)
    block += attention_flops(clips * frames, 1 + patches, 1 + patches, width)
    block += matmul_flops(tokens, width, 2 * config.mlp_ratio * width, to_weight=spatial)
    stem = matmul_flops(over_time, 3 * config.patch_size**2, width, to_input=False, to_weight=spatial)
    return stem + block * config.num_hidden_layers


def abstractor_flops(config: MPlugVideoConfig, clips: int) -> Flops:
    """The abstractor and the projection to the prefix."""
    vision = config.vision_config
    width, queries = vision.hidden_size, clips * config.num_queries
    keys = 1 + vision.num_frames * (vision.image_size // vision.patch_size) ** 2
    found = matmul_flops(queries, width, 2 * width) + matmul_flops(clips * keys, width, 2 * width)
    found += attention_flops(clips, config.num_queries, keys + 1, width)  # + 1: the learned key
    found += matmul_flops(queries, width, 2 * vision.mlp_ratio * width)
    return found + matmul_flops(queries, width, config.text_config.hidden_size)


def decoder_flops(decoder: PreTrainedModel, read: DecoderPass, *, frozen: bool) -> Flops:
    """One decoder pass, with logits only for scored tokens."""
    config, tokens = decoder.config, read.rows * read.length
    layers = sum(
        math.prod(shape)
        for module in decoder.base_model.modules()
        for weight in ([] if isinstance(module, nn.Embedding) else module.parameters(recurse=False))
        if len(shape := getattr(weight, "ds_shape", weight.shape)) == 2  # ds_shape: the full shape under ZeRO-3
    )
    gradient = {"to_input": read.after_prefix or not frozen, "to_weight": not frozen}
    found = matmul_flops(tokens, layers, 1, **gradient)
    attended = attention_flops(read.rows, read.length, read.length, config.hidden_size, backward=gradient["to_input"])
    found += attended * config.num_hidden_layers
    return found + matmul_flops(read.scored, config.hidden_size, config.vocab_size, **gradient)


def owl_vision_flops(config: MplugOwlVisionConfig, read: VisionPass, *, trained: bool) -> Flops:
    """The vision model of mPLUG-Owl. Temporal blocks read clips of several frames."""
    width, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
    rows = read.clips * read.frames
    gradient = {"to_input": trained, "to_weight": trained}
    block = matmul_flops(rows * tokens, width, 4 * width + 2 * config.intermediate_size, **gradient)
    block += attention_flops(rows, tokens, tokens, width, backward=trained)
    if read.frames > 1:
        block += matmul_flops(rows * (tokens - 1), width, width, **gradient)  # to half the width and back
    stem = matmul_flops(rows * (tokens - 1), 3 * config.patch_size**2, width, to_input=False, to_weight=trained)
    return stem + block * config.num_hidden_layers


def owl_abstractor_flops(config: MplugOwlConfig, read: VisionPass, *, trained: bool) -> Flops:
    """The abstractor of mPLUG-Owl, whose keys include its queries, and the projections to the decoder."""
    vision, abstractor = config.vision_config, config.visual_abstractor_config
    width, text_width = abstractor.hidden_size, config.text_config.hidden_size
    queries = config.num_query_tokens * (1 + (read.frames > 1))
    keys = queries + read.frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    gradient = {"to_input": trained, "to_weight": trained}
    layer = matmul_flops(read.clips * queries, width, 2 * width + 3 * abstractor.mlp_size, **gradient)
    layer += matmul_flops(read.clips * keys, width, 2 * width, **gradient)
    layer += attention_flops(read.clips, queries, keys, width, backward=trained)
    return layer * abstractor.num_hidden_layers + matmul_flops(read.clips * queries, width, text_width, **gradient)


def _owl_flops(task: Task, reads: list[VisionPass], passes: list[DecoderPass]) -> Flops:
    settings, config = task.config.model, task.model.config
    # gradients pass through a frozen abstractor to a trained vision model
    trains_vision = not settings.freeze_vision
    trains_visual = trains_vision or not settings.freeze_abstractor
    found = Flops()
    for read in reads:
        found += owl_vision_flops(config.vision_config, read, trained=trains_vision)
        found += owl_abstractor_flops(config, read, trained=trains_visual)
    for each in passes:
        # with LoRA gradients pass through all layers, otherwise only to the media
        passed = replace(each, after_prefix=trains_visual or settings.lora.rank > 0)
        found += decoder_flops(task.model.language_model, passed, frozen=settings.freeze_decoder)
    return found


def step_flops(task: Task, reads: list[VisionPass], passes: list[DecoderPass]) -> Flops:
    """Forward and backward pass of a task over a batch that needs these passes. Small heads are ignored."""
    model, config = task.model, task.model.config
    if isinstance(config, MplugOwlConfig):
        return _owl_flops(task, reads, passes)
    if not isinstance(config, MPlugVideoConfig):  # the decoder alone
        return sum((decoder_flops(model, read, frozen=False) for read in passes), Flops())
    found = Flops()
    for read in reads:
        found += vision_flops(config.vision_config, read.clips, spatial=not config.freeze_vision)
        if any(each.after_prefix for each in passes):
            found += abstractor_flops(config, read.clips)
    return sum((decoder_flops(model.decoder, read, frozen=config.freeze_decoder) for read in passes), found)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak operations per second of the device: from its data sheet, or measured with a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := [gpu.bf16_peak for part, gpu in GPUS.items() if part in name]:
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
