"""Layers of both model families, in forms that are fast and keep little for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Apply = Callable[..., Tensor]
"""apply(then, make, *inputs) is then(make(*inputs)), in one of the two ways below."""


FEW_ROWS = 32
"""Up to this many rows, a product with a weight is computed as (weight · xᵀ)ᵀ on a CPU."""
WIDE = 16384
"""Outputs of a layer from which on MKL is faster than oneDNN: those over a vocabulary."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias, (…, in) -> (…, out).

    On a CPU in fp32 it is computed as a convolution over single tokens: torch 2.13 uses MKL for matrix products, which
    reaches half the speed of an AMD CPU, and oneDNN for convolutions, which reaches all of it. Same sums, 1.8 times as
    fast. A few rows, as in generation, are faster as columns: 1.2 to 5 times.
    """
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        output = (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)
        return output if bias is None else output + bias
    if len(weight) >= WIDE:
        return F.linear(x, weight, bias)
    tokens = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, in, tokens, 1), channels last
    tokens = F.conv2d(tokens, weight[:, :, None, None], bias)  # (1, out, tokens, 1)
    return tokens.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_linear(network: nn.Module) -> None:
    """Makes the linear layers of a network of transformers compute as above. Their weights stay as they are."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation of CLIP, in fewer passes over memory than step by step."""
    return F.silu(1.702 * x).div_(1.702)


def keep_intermediate(then: Callable[[Tensor], Tensor], make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return then(make(*inputs))


def recompute_intermediate(then: Callable[[Tensor], Tensor], make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Keeps only the inputs of `make` for the backward pass and recomputes its result: for norms and activations."""
    output = checkpoint(make, *inputs, use_reentrant=False, preserve_rng_state=False)
    storage = output.untyped_storage().data_ptr()

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make(*inputs).as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        return then(output)


def embed_patches(pixel_values: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A convolution over patches as a matrix product, (B, C, T, H, W) -> (B, T, N, D).

    Its backward pass is 5 times as fast.
    """
    size = convolution.kernel_size[0]
    patches = pixel_values.unfold(3, size, size).unfold(4, size, size)  # (B, C, T, H/P, W/P, P, P)
    patches = patches.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(2, 3)  # (B, T, N, C·P·P)
    return linear(patches, convolution.weight.flatten(1), convolution.bias)


def attention_output(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention without a mask, (B, M, S, D / M) each."""
    if q.is_cpu and q.dtype == torch.bfloat16:  # torch 2.13's fused attention is slower there than plain products
        return F.dropout((q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
