"""All uses of private attributes of DeepSpeed 0.19.

Checkpoints need the fp32 weights and Adam's moments, whose location in ZeRO's optimizers is private. ATTRIBUTES,
HALF_ATTRIBUTES, PARAMETER_ATTRIBUTES and FRAGMENT_ATTRIBUTES list every attribute that is used. `missing_attributes`
names those that another version lacks. `prepare_start` also uses `deepspeed.ops.__compatible_ops__` and
`deepspeed.runtime.zero.muon`.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import deepspeed.ops
from torch import Tensor, nn

from model.errors import StageError
from model.training.state import Fragment, TrainedState

ATTRIBUTES: dict[int, tuple[str, ...]] = {
    0: ("param_groups",),
    1: ("bit16_groups", "single_partition_of_fp32_groups", "optimizer", "update_lp_params"),
    2: ("bit16_groups", "single_partition_of_fp32_groups", "optimizer", "update_lp_params"),
    3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "optimizer",
        "checkpoint_event_prologue",
    ),
}
"""Attributes of the optimizer that `deepspeed.initialize` returns, by ZeRO stage."""
HALF_ATTRIBUTES = ("fp16_groups", "fp32_groups", "optimizer")
"""The same for stage 0 with bf16, which uses DeepSpeed's own optimizer."""
PARAMETER_ATTRIBUTES = {1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_numel", "ds_tensor")}
"""Attributes of each trained parameter."""
FRAGMENT_ATTRIBUTES = ("lp_fragment_address", "hp_fragment_address")
"""Attributes of `_hp_mapping`. Both have `start` and `numel`."""


def prepare_start() -> None:
    """Skips parts of DeepSpeed's start that this project does not need."""
    # a shared-memory op for inference on CPUs, whose compilation needs a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed checks whether the optimizer is Muon; importing Muon prepares its kernels, 1.4 s of every start
    stand_in = ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    stand_in.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault(stand_in.__name__, stand_in)


def trained_state(network: nn.Module, optimizer: Any, stage: int, rank: int) -> TrainedState:
    """The state of this process under DeepSpeed's `optimizer`. Raises StageError if DeepSpeed lacks an attribute."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if missing := missing_attributes(optimizer, stage, next(iter(parameters.values()))):
        raise StageError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which ZeRO stage {stage} needs here. "
            "Install the version of requirements.lock."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    find = {0: _replicated, 1: _sharded, 2: _sharded, 3: _partitioned}[stage]
    fragments = [
        Fragment(names[id(parameter)], start, master, offset, numel)
        for parameter, start, master, offset, numel in find(optimizer, rank)
    ]
    return TrainedState(fragments=fragments, optimizer=getattr(optimizer, "optimizer", optimizer))


def missing_attributes(optimizer: Any, stage: int, parameter: nn.Parameter) -> list[str]:
    """The attributes that do not exist, as Class.attribute."""
    is_half = stage == 0 and type(optimizer).__module__.startswith("deepspeed")
    wanted = [(optimizer, name) for name in (HALF_ATTRIBUTES if is_half else ATTRIBUTES[stage])]
    wanted += [(parameter, name) for name in PARAMETER_ATTRIBUTES.get(stage, ())]
    if (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
        wanted += [(fragment, name) for name in FRAGMENT_ATTRIBUTES]
    return [f"{type(owner).__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]


Found = Iterator[tuple[nn.Parameter, int, Tensor, int, int]]
"""(parameter, start in it, master tensor, offset in that, number of elements)"""


def _replicated(optimizer: Any, _rank: int) -> Found:
    """Stage 0: every process holds everything, in fp32 or with fp32 copies of its bf16 weights."""
    groups = optimizer.param_groups
    low = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in groups]
    for parameters, group in zip(low, groups, strict=True):
        for parameter, master in zip(parameters, group["params"], strict=True):
            yield parameter, 0, master, 0, master.numel()


def _sharded(optimizer: Any, _rank: int) -> Found:
    """Stages 1 and 2: one flat tensor per parameter group, split into equal parts."""
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            if (held := parameter._hp_mapping) is not None:
                low, high = held.lp_fragment_address, held.hp_fragment_address
                yield parameter, low.start, flat, high.start, high.numel


def _partitioned(optimizer: Any, rank: int) -> Found:
    """Stage 3: every parameter is split into equal parts, the last one padded."""
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * numel
            held = min(numel, parameter.ds_numel - start)
            if held > 0:
                yield parameter, start, optimizer.fp32_partitioned_groups_flat[index], offset, held


def refresh_weights(optimizer: Any, stage: int) -> None:
    """Updates the weights of the network from the fp32 weights."""
    if stage in {1, 2}:
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # releases weights that were gathered from the old values
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            for parameter in group:
                _, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
                parameter.ds_tensor.data.copy_(flat.detach().narrow(0, offset, numel))
    elif hasattr(optimizer, "fp16_groups"):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                parameter.data.copy_(master)
