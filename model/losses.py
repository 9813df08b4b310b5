"""Cross entropy over a large vocabulary without materialising all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS_AT_ONCE = 512
"""Maximum number of tokens with logits at the same time (105 MB for V = 51,200 in fp32); never more than half."""


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradients of states and logits in the forward pass.

    It keeps those of the states, and those of the logits only if the head is trained.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses, of_states, of_logits = [], torch.empty_like(states), None
        if weight.requires_grad:
            of_logits = states.new_empty(len(states), len(weight))
        at_once = min(ROWS_AT_ONCE, -(-len(states) // 2))
        for first in range(0, len(states), at_once):
            part = slice(first, first + at_once)
            wanted = targets[part]
            logits = F.linear(states[part], weight, bias).float()  # (rows, V)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            losses.append((normaliser - logits.gather(1, wanted[:, None])).squeeze(1))
            gradient = logits.sub_(normaliser).exp_()
            gradient.scatter_add_(1, wanted[:, None], -torch.ones_like(normaliser))
            gradient = gradient.to(weight.dtype)
            of_states[part] = gradient @ weight
            if of_logits is not None:
                of_logits[part] = gradient
            del logits, gradient  # before the next ones are allocated
        ctx.has_bias = bias is not None
        ctx.save_for_backward(of_states, of_logits, None if of_logits is None else states)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        of_states, of_logits, states = ctx.saved_tensors
        scale = gradient[:, None].to(of_states.dtype)
        if of_logits is None:
            return of_states * scale, None, None, None
        of_bias = (of_logits.T @ scale).squeeze(1) if ctx.has_bias else None
        return of_states * scale, of_logits.T @ (states * scale), of_bias, None


def token_cross_entropy(states: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Cross entropies (R,) in fp32 of R tokens with states (R, D), under the output layer `head` (V, D)."""
    if len(states) and states.requires_grad:
        return _CrossEntropy.apply(states, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
    return F.cross_entropy(head(states).float(), targets, reduction="none")


def losses_at(states: Tensor, head: torch.nn.Linear, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Cross entropies (B, L - 1) of tokens 1..L-1 from states (B, L, D), zero where `loss_mask` (B, L - 1) is zero.

    Logits are computed only where a loss is taken: with V = 51,200 they would be the largest tensor of the step.
    """
    wanted = loss_mask.bool()
    losses = states.new_zeros(wanted.shape, dtype=torch.float32)
    return losses.masked_scatter(wanted, token_cross_entropy(states[:, :-1][wanted], head, input_ids[:, 1:][wanted]))
