"""Features of all processes for contrastive losses. With one process, the features themselves."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def gather(features: Tensor) -> Tensor:
    """(B, …) of each process -> (W · B, …), in rank order; gradients flow back to the process they came from."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return torch.cat(tuple(all_gather(features.contiguous())))  # type: ignore[no-untyped-call]


def own_rows(batch: int, device: torch.device) -> Tensor:
    """Where this process's rows stand in `gather`'s result."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(batch, device=device) + rank * batch
