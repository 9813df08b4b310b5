"""The state that training changes, named by parameter and offset, independent of world size and ZeRO stage.

ZeRO stores fp32 weights and Adam's moments in flat buffers whose layout depends on the number of processes. Here each
process describes its part as fragments of parameters, so that a checkpoint of eight processes loads on four, and one of
stage 2 in stage 0, without conversion.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("fp32", *MOMENTS)


@dataclass
class Progress:
    """The progress of a run, which is saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done, which is also the position in the data, in the schedule and in all randomness."""
    skips: int = 0
    """Steps whose gradients were not finite."""
    consecutive_skips: int = 0
    read_failures: int = 0
    """Unreadable clips, on all processes."""
    best_step: int = -1
    best_value: float | None = None
    """Value of the metric that selects the best checkpoint."""

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Progress":
        """Reads the progress of a checkpoint. One field had another name in version 0.1.0."""
        return cls(**{"consecutive_skips" if key == "skips_in_a_row" else key: value for key, value in saved.items()})

    def note(self, value: float, *, lower_is_better: bool) -> None:
        """Makes the current step the best one if its value is better than all before."""
        if not math.isfinite(value):
            return
        best = self.best_value
        if best is None or (value < best if lower_is_better else value > best):
            self.best_step, self.best_value = self.step, value

    def forget_best(self) -> None:
        """Called if the checkpoint of the best step could not be written."""
        self.best_step, self.best_value = -1, None


@dataclass(frozen=True)
class Fragment:
    """A part of one flattened parameter that this process holds."""

    name: str
    start: int
    """Offset of its first element in the flattened parameter."""
    master: Tensor
    """The optimizer's fp32 tensor, which may also hold other parameters."""
    offset: int
    """Offset of the fragment in `master`."""
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment as a view of `master`, or of a moment, which has the same layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(kw_only=True)
class TrainedState:
    """Views of live tensors: reading does not copy, and writing changes the run."""

    fragments: list[Fragment]
    optimizer: torch.optim.Optimizer
    """The innermost optimizer, whose state is keyed by master tensor."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of this process, named "<kind>|<start>|<parameter>"."""
        return {
            f"{kind}|{fragment.start}|{fragment.name}": fragment.of(tensor)
            for fragment in self.fragments
            for kind, tensor in self._by_kind(fragment.master).items()
        }

    def load(self, saved: Mapping[str, Tensor]) -> int:
        """Copies the parts that overlap with the fragments of this process, and returns the number of elements."""
        by_parameter: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        for key, tensor in saved.items():
            kind, offset, name = key.split("|", 2)
            by_parameter.setdefault((kind, name), []).append((int(offset), tensor))
        copied = 0
        for fragment in self.fragments:
            for kind, tensor in self._by_kind(fragment.master).items():
                view = fragment.of(tensor)
                for start, source in by_parameter.get((kind, fragment.name), ()):
                    first = max(start, fragment.start)
                    numel = min(start + source.numel(), fragment.start + fragment.numel) - first
                    if numel > 0:
                        view.narrow(0, first - fragment.start, numel).copy_(source.narrow(0, first - start, numel))
                        copied += numel
        return copied

    @property
    def numel(self) -> int:
        """Number of elements that this process reads from a complete checkpoint."""
        return len(KINDS) * sum(fragment.numel for fragment in self.fragments)

    @property
    def updates(self) -> int:
        """Number of updates of Adam, for its bias correction."""
        return int(self._by_kind_state(self.fragments[0].master)["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for fragment in self.fragments:
            self._by_kind_state(fragment.master)["step"].fill_(count)

    def _by_kind(self, master: Tensor) -> dict[str, Tensor]:
        state = self._by_kind_state(master)
        return {"fp32": master, **{moment: state[moment] for moment in MOMENTS}}

    def _by_kind_state(self, master: Tensor) -> dict[str, Tensor]:
        """Adam's state of a master tensor. torch only creates it at the first update."""
        state: dict[str, Tensor] = self.optimizer.state[master]
        if not state:
            state |= {moment: torch.zeros_like(master) for moment in MOMENTS}
            state["step"] = torch.zeros((), device=master.device)  # the fused update needs it on the device
        return state
