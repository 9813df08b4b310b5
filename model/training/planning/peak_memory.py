"""Peak memory of tensors during a computation."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
"""Operations that take most of the time. Convolutions are computed: their results have another layout than on meta."""


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the memory that operations on a CPU allocate and release. `known` tensors are not counted.

    Products are allocated but not computed: memory does not depend on values.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in known})

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = _unfilled(func, args, kwargs) if func in PRODUCTS else func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, size)
        return out

    def _release(self, size: int) -> None:
        self.now -= size


def _unfilled(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """New tensors like those that `func` returns."""
    out = func(*tree_map_only(Tensor, partial(_like, device="meta"), args), **kwargs)
    return tree_map_only(Tensor, partial(_like, device="cpu"), out)


def _like(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
