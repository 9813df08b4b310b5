"""The vision model: a ViT with a temporal block in every layer, pixels (B, C, T, H, W) -> tokens (B, T, 1 + N, D).

B batch, C channels, T frames, H W pixels, N patches per frame, D width, M heads. Row 0 of each frame is its class
token. An image is a clip of one frame, and skips the temporal blocks. Layout and names of weights are those of
mPLUG-Owl's video model (arXiv 2304.14178; local temporal modelling as in arXiv 2302.00402).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from model.layers import (
    Apply,
    Linear,
    attention_output,
    embed_patches,
    keep_intermediate,
    linear,
    quick_gelu,
    recompute_intermediate,
)
from model.mplug_owl_video.configuration import MplugOwlVisionConfig


class PointwiseConv(nn.Conv3d):
    """A convolution with a kernel of one position, as a linear layer over the last dimension: (…, in) -> (…, out)."""

    def __init__(self, channels: int, out_channels: int, *, initially_zero: bool = False) -> None:
        super().__init__(channels, out_channels, kernel_size=1)
        self.initially_zero = initially_zero

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(1), self.bias)


class TemporalConv(nn.Conv3d):
    """A depth-wise convolution over three frames, (B, T, N, D) -> (B, T, N, D), as three shifted products."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0), groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        before, at, after = self.weight.flatten(1).unbind(dim=1)  # (D,) each
        assert self.bias is not None
        output = x * at + self.bias
        output[:, 1:].addcmul_(x[:, :-1], before)
        output[:, :-1].addcmul_(x[:, 1:], after)
        return output


class TemporalBlock(nn.Module):
    """Mixes each patch with the same patch of the two neighbouring frames, in half the width."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.ln = nn.LayerNorm(width, eps=1e-5)  # not layer_norm_eps: the published model was trained with this value
        self.down_proj = PointwiseConv(width, width // 2)
        self.conv = TemporalConv(width // 2)
        self.up_proj = PointwiseConv(width // 2, width, initially_zero=True)

    def forward(self, patches: Tensor, apply: Apply) -> Tensor:  # (B, T, N, D)
        return apply(self.up_proj, quick_gelu, self.conv(apply(self.down_proj, self.ln, patches)))


class Attention(nn.Module):
    """Self-attention within each frame. Queries, keys and values are interleaved head by head in one weight."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, S, D)
        batch, frames, length, width = x.shape
        qkv = self.query_key_value(x).view(batch * frames, length, self.num_heads, 3, -1)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # (B·T, M, S, D / M) each
        return self.dense(attention_output(q, k, v).transpose(1, 2).reshape(batch, frames, length, width))


class MLP(nn.Module):
    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(self.fc2, quick_gelu, self.fc1(x))


class VisionLayer(nn.Module):
    """Patches over time, then attention and an MLP per frame."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.temporal = TemporalBlock(config)
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:  # (B, T, 1 + N, D)
        if x.shape[1] > 1:
            patches = x[:, :, 1:]
            # the class token is doubled: the published weights were trained with a temporal block that returns it as is
            x = torch.cat((2 * x[:, :, :1], patches + self.temporal(patches, apply)), dim=2)
        x = x + apply(self.self_attn, self.input_layernorm, x)
        return x + apply(partial(self.mlp, apply=apply), self.post_attention_layernorm, x)


class VisionEmbeddings(nn.Module):
    """Patches and a class token with positions within the frame. Frames have no position."""

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(3, width, kernel_size=size, stride=size, bias=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (config.image_size // size) ** 2, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, T, H, W)
        patches = embed_patches(pixel_values, self.patch_embed)  # (B, T, N, D)
        cls = self.cls_token.expand(*patches.shape[:2], -1, -1)
        return self.pre_layernorm(torch.cat((cls, patches), dim=2) + self.position_embedding)


class VisionEncoder(nn.Module):
    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 1 + N, D)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, keep_intermediate, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, recompute_intermediate if torch.is_grad_enabled() else keep_intermediate)
        return x


class MplugOwlVisionModel(PreTrainedModel):
    """Normalised tokens of every frame of a clip or an image."""

    config_class = MplugOwlVisionConfig
    config: MplugOwlVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MplugOwlVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._refuse_float16()
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, T, 1 + N, D) of clips (B, C, T, H, W), or with T = 1 of images (B, C, H, W)."""
        if pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(2)
        size = self.config.image_size
        if pixel_values.shape[1] != 3 or pixel_values.shape[3:] != (size, size):
            raise ValueError(
                f"pixel_values must have the shape (clips, 3, frames, {size}, {size}), or (images, 3, {size}, {size}), "
                f"got {tuple(pixel_values.shape)}. Preprocess with the processor that is saved with the model."
            )
        self._refuse_float16()
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values.to(self.dtype))))

    def _refuse_float16(self) -> None:
        if self.post_layernorm.weight.dtype == torch.float16:
            raise ValueError("the dtype must be bfloat16 or float32: in float16 the temporal blocks overflow to NaN.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normals (std 0.02). A temporal block is initially zero, so a clip is read frame by frame."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            init_layer(module, std)
        elif isinstance(module, PointwiseConv | TemporalConv):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
            if getattr(module, "initially_zero", False):
                init.zeros_(module.weight)
        elif isinstance(module, VisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embedding, std=std)


def init_layer(module: nn.Linear | nn.Conv2d | nn.LayerNorm, std: float) -> None:
    """Normals for weights, ones for those of a norm, zeros for biases."""
    if isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
    else:
        init.normal_(module.weight, std=std)
    if module.bias is not None:
        init.zeros_(module.bias)
