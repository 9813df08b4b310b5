"""Cross entropy over a large vocabulary without materialising all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS_AT_ONCE = 512
"""Maximum number of tokens with logits at the same time (105 MB for V = 51,200 in fp32); never more than half."""


class _FrozenHead(torch.autograd.Function):
    """Computes the gradient of the states in the forward pass, and keeps it instead of the logits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses, gradients = [], []
        at_once = min(ROWS_AT_ONCE, -(-len(states) // 2))
        for rows, wanted in zip(torch.split(states, at_once), torch.split(targets, at_once), strict=True):
            logits = F.linear(rows, weight, bias).float()  # (rows, V)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            losses.append((normaliser - logits.gather(1, wanted[:, None])).squeeze(1))
            gradient = logits.sub_(normaliser).exp_()
            gradient.scatter_add_(1, wanted[:, None], -torch.ones_like(normaliser))
            gradients.append((gradient.to(weight.dtype) @ weight).to(states.dtype))
            del logits, gradient  # before the next ones are allocated
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (of_states,) = ctx.saved_tensors
        return of_states * gradient[:, None].to(of_states.dtype), None, None, None


def token_cross_entropy(states: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Cross entropies (R,) in fp32 of R tokens with states (R, D), under the output layer `head` (V, D)."""
    if len(states) and states.requires_grad and not head.weight.requires_grad:
        return _FrozenHead.apply(states, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return F.cross_entropy(head(states).float(), targets, reduction="none")


def losses_at(states: Tensor, head: torch.nn.Linear, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Cross entropies (B, L - 1) of tokens 1..L-1 from states (B, L, D), zero where `loss_mask` (B, L - 1) is zero.

    Logits are computed only where a loss is taken: with V = 51,200 they would be the largest tensor of the step.
    """
    wanted = loss_mask.bool()
    losses = states.new_zeros(wanted.shape, dtype=torch.float32)
    return losses.masked_scatter(wanted, token_cross_entropy(states[:, :-1][wanted], head, input_ids[:, 1:][wanted]))
