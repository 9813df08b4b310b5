import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.losses import ROWS_AT_ONCE, token_cross_entropy


@pytest.mark.parametrize("rows", [0, 1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 5])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_losses_and_gradients_match_full_logits(rows: int, frozen: bool, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=bias).requires_grad_(not frozen)
    states, targets = torch.randn(rows, 8, requires_grad=True), torch.randint(50, (rows,))
    weights = torch.rand(rows)  # losses with different weights
    found, expected = (
        token_cross_entropy(states, head, targets),
        F.cross_entropy(head(states), targets, reduction="none"),
    )
    torch.testing.assert_close(found, expected)
    inputs = [states, *(parameter for parameter in head.parameters() if not frozen)]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_logits_far_from_zero_do_not_overflow() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1000.0], [0.0], [-1000.0]]))
    states = torch.ones(1, 1, requires_grad=True)
    losses = token_cross_entropy(states, head, torch.tensor([1]))
    losses.backward()
    assert losses.tolist() == [1000.0]
    assert states.grad.tolist() == [[1000.0]]
