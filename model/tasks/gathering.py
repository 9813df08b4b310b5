"""Features of all processes for contrastive losses. With one process, the features themselves."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Not torch's own: on gloo (torch 2.13) it mixes up the numbers of a gradient that is not contiguous."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # what every process's loss says about every process's features
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(features: Tensor) -> Tensor:
    """(B, …) of each process -> (W · B, …), in rank order; gradients flow back to the process they came from."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    gathered: Tensor = _Gather.apply(features.contiguous())  # type: ignore[no-untyped-call]
    return gathered


def own_rows(batch: int, device: torch.device) -> Tensor:
    """Where this process's rows stand in `gather`'s result."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(rank * batch, (rank + 1) * batch, device=device)
