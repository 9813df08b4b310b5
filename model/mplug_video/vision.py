"""TimeSformer with divided space-time attention: pixels (B, C, T, H, W) -> tokens (B, 1 + T·N, D).

B batch, C channels, T frames, H W pixels, N patches per frame, D width, M heads. One class token stands for the whole
clip. Paper: arXiv 2306.04362 section 4.1; block layout of arXiv 2102.05095.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from model.layers import (
    Apply,
    Linear,
    attention_output,
    embed_patches,
    keep_intermediate,
    linear,
    recompute_intermediate,
)
from model.mplug_video.configuration import TimeSformerConfig


class Attention(nn.Module):
    """Self-attention whose keys have no bias, as in the released weights."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, then: Linear | None = None) -> Tensor:  # (B, S, D)
        """`then` is a linear layer behind this one; with the output projection it makes a single product."""
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, B, M, S, D / M)
        x = attention_output(q, k, v).transpose(1, 2).reshape(batch, length, width)
        if then is None:
            return self.proj(x)
        return linear(x, then.weight @ self.proj.weight, then(self.proj.bias))


class MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.fc1 = Linear(width, config.mlp_ratio * width)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = Linear(config.mlp_ratio * width, width)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(self.fc2, self.act, self.fc1(x))


class Block(nn.Module):
    """Attention over time per patch, then over space per frame, then an MLP on all tokens."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.temporal_norm = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = Attention(config)
        self.temporal_fc = Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(config)

    def forward(self, cls: Tensor, x: Tensor, apply: Apply) -> tuple[Tensor, Tensor]:  # (B, 1, D), (B, T, N, D)
        batch, frames, patches, width = x.shape
        over_time = apply(partial(self.temporal_attn, then=self.temporal_fc), self._patches_over_time, x)  # (B·N, T, D)
        x = x + over_time.view(batch, patches, frames, width).transpose(1, 2)

        per_frame = apply(self.attn, self._tokens_per_frame, cls, x)  # (B·T, 1 + N, D)
        per_frame = per_frame.view(batch, frames, 1 + patches, width)
        cls = cls + per_frame[:, :, 0].mean(dim=1, keepdim=True)
        x = x + per_frame[:, :, 1:]

        cls = cls + self.mlp(self.norm2(cls), apply)
        return cls, x + apply(partial(self.mlp, apply=apply), self.norm2, x)

    def _patches_over_time(self, x: Tensor) -> Tensor:
        return self.temporal_norm(x.transpose(1, 2).flatten(0, 1))  # (B·N, T, D)

    def _tokens_per_frame(self, cls: Tensor, x: Tensor) -> Tensor:
        """Every frame sees the same class token; its updates are averaged over the frames."""
        cls = cls.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
        return self.norm1(torch.cat((cls, x), dim=2).flatten(0, 1))  # (B·T, 1 + N, D)


class TimeSformer(PreTrainedModel):
    """The vision encoder. Row 0 of its output is the class token, then the patches, frame by frame."""

    config_class = TimeSformerConfig
    config: TimeSformerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        num_patches = (config.image_size // patch) ** 2
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not config.clip_stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.norm_pre = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.clip_stem else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.checkpoint_activations = self.is_compiled = False
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, T, H, W)
        batch, _, frames, height, width = pixel_values.shape
        expected = (self.config.num_frames, self.config.image_size, self.config.image_size)
        if (frames, height, width) != expected:
            raise ValueError(
                f"pixel_values must have (frames, height, width) = {expected}, got {(frames, height, width)}. "
                "Preprocess with the processor that is saved with the model, or resize the model (TimeSformer.resize)."
            )
        x = embed_patches(pixel_values, self.patch_embed)  # (B, T, N, D)
        x = x + self.pos_embed[:, None, 1:] + self.temporal_embed[:, :, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)  # (B, 1, D)
        cls, x = self.norm_pre(cls), self.norm_pre(x)
        recompute = torch.is_grad_enabled() and not self.is_compiled  # a compiler decides itself what to recompute
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                cls, x = checkpoint(block, cls, x, keep_intermediate, use_reentrant=False, preserve_rng_state=False)
            else:
                cls, x = block(cls, x, recompute_intermediate if recompute else keep_intermediate)
        return self.norm(torch.cat((cls, x.flatten(1, 2)), dim=1))  # (B, 1 + T·N, D)

    def compile_blocks(self) -> None:
        """Compiles the blocks on first use. They share the compiled code."""
        self.is_compiled = True
        for block in self.blocks:
            block.compile()

    def resize(self, image_size: int, num_frames: int) -> None:
        """Adapts the encoder to another image size or number of frames by interpolating its position embeddings."""
        side = image_size // self.config.patch_size
        self.pos_embed = nn.Parameter(resize_positions(self.pos_embed.detach(), side))
        self.temporal_embed = nn.Parameter(resize_frames(self.temporal_embed.detach(), num_frames))
        self.config.image_size, self.config.num_frames = image_size, num_frames

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals (std 0.015) for weights and embeddings; residual outputs are scaled down with depth.

        temporal_fc is zero in every block, so that a clip is initially read frame by frame.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TimeSformer):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.pos_embed, std=std)
            init.zeros_(module.temporal_embed)
            for depth, block in enumerate(module.blocks, start=1):
                _init_block(block, std, residual_std=std / (2 * depth) ** 0.5)


def _init_block(block: nn.Module, std: float, residual_std: float) -> None:
    assert isinstance(block, Block)
    for output in (block.attn.proj, block.mlp.fc2):
        init.trunc_normal_(output.weight, std=residual_std)
    for attention in (block.attn, block.temporal_attn):
        init.zeros_(attention.q_bias)
        init.zeros_(attention.v_bias)
    init.zeros_(block.temporal_fc.weight)
    init.zeros_(block.temporal_fc.bias)


def resize_positions(pos_embed: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + N, D) for side · side patches: bilinear; the row of the class token is kept."""
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    old_side = round(grid.shape[1] ** 0.5)
    if side == old_side:
        return pos_embed
    grid = grid.view(1, old_side, old_side, -1).permute(0, 3, 1, 2).float()  # (1, D, side, side)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return torch.cat((cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)


def resize_frames(temporal_embed: Tensor, num_frames: int) -> Tensor:
    """Frame embeddings (1, T, D) for another number of frames: linear, in their precision."""
    if temporal_embed.shape[1] == num_frames:
        return temporal_embed
    resized = F.interpolate(temporal_embed.transpose(1, 2), size=num_frames, mode="linear", align_corners=False)
    return resized.transpose(1, 2).contiguous()
