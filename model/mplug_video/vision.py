"""TimeSformer with divided space-time attention: pixels (B, C, T, H, W) -> tokens (B, 1 + T·N, D).

B batch, C channels, T frames, H W pixels, N patches per frame, D width, M heads. One class token stands for the whole
clip. Paper: arXiv 2306.04362 section 4.1; block layout of arXiv 2102.05095.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.mplug_video.configuration import TimeSformerConfig


class Attention(nn.Module):
    """Self-attention whose keys have no bias, as in the released weights."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D)
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (3, B, M, S, D / M)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two linear layers around an exact GELU. (CLIP's own QuickGELU is not used by the released weights.)"""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention over time per patch, then over space per frame, then an MLP on all tokens."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.temporal_norm = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = Attention(config)
        self.temporal_fc = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.mlp_ratio)

    def forward(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, 1, D), (B, T, N, D)
        batch, frames, patches, width = x.shape
        over_time = x.transpose(1, 2).reshape(batch * patches, frames, width)  # (B·N, T, D)
        over_time = self.temporal_fc(self.temporal_attn(self.temporal_norm(over_time)))
        x = x + over_time.view(batch, patches, frames, width).transpose(1, 2)

        # every frame sees the same class token; its updates are averaged over the frames
        per_frame = torch.cat((cls.unsqueeze(1).expand(-1, frames, -1, -1), x), dim=2)  # (B, T, 1 + N, D)
        per_frame = self.attn(self.norm1(per_frame.flatten(0, 1)))  # (B·T, 1 + N, D)
        per_frame = per_frame.view(batch, frames, 1 + patches, width)
        cls = cls + per_frame[:, :, 0].mean(dim=1, keepdim=True)
        x = x + per_frame[:, :, 1:]

        cls = cls + self.mlp(self.norm2(cls))
        x = x + self.mlp(self.norm2(x))
        return cls, x


class TimeSformer(nn.Module):
    """The vision encoder. Row 0 of its output is the class token, then the patches, frame by frame."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        num_patches = (config.image_size // patch) ** 2
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=not config.clip_stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, config.num_frames, width))
        self.norm_pre = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.clip_stem else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, T, H, W)
        batch, _, frames, height, width = pixel_values.shape
        expected = (self.config.num_frames, self.config.image_size, self.config.image_size)
        if (frames, height, width) != expected:
            raise ValueError(
                f"pixel_values must have (frames, height, width) = {expected}, got {(frames, height, width)}. "
                "Preprocess with the processor saved beside the model, or convert the model to another size."
            )
        x = self.patch_embed(pixel_values.transpose(1, 2).flatten(0, 1))  # (B·T, D, H/P, W/P)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))  # (B, T, N, D)
        x = x + self.pos_embed[:, None, 1:] + self.temporal_embed[:, :, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)  # (B, 1, D)
        cls, x = self.norm_pre(cls), self.norm_pre(x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                cls, x = checkpoint(block, cls, x, use_reentrant=False)
            else:
                cls, x = block(cls, x)
        return self.norm(torch.cat((cls, x.flatten(1, 2)), dim=1))  # (B, 1 + T·N, D)
