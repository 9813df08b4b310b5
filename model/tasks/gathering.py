"""Gathers the features of all processes for contrastive losses."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Replaces torch's function, which on gloo (torch 2.13) corrupts gradients that are not contiguous."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # sums the gradients of all losses for the features of all processes
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(features: Tensor) -> Tensor:
    """(B, …) of each process -> (W · B, …) in rank order. Gradients flow back to the process of the features."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return _Gather.apply(features.contiguous())  # type: ignore[no-untyped-call]


def own_rows(batch: int, device: torch.device) -> Tensor:
    """Positions of this process's rows in the result of `gather`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(rank * batch, (rank + 1) * batch, device=device)
