"""DeepSpeed behind one method: a step over micro-batches. The only file that imports deepspeed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from model.config import RunConfig
from model.data.loader import Batch
from model.tasks.base import TaskNetwork
from model.training.distributed import Processes
from model.training.optim import parameter_groups


@dataclass(frozen=True, kw_only=True)
class StepResult:
    losses: dict[str, Tensor]
    """`loss` and its parts by name: means over this process's micro-batches."""
    grad_norm: float


class Engine:
    """Trains a task's network; the optimizer state is sharded by ZeRO, the frozen decoder has none."""

    def __init__(self, network: TaskNetwork, config: RunConfig, processes: Processes) -> None:
        _quiet()
        # DeepSpeed would compile a shared-memory op for CPU inference at start-up, which needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if processes.device.type == "cpu" and config.training.precision == "bf16":
            # torch 2.13's fused CPU attention is 3 to 7 times slower than plain matrix products in bf16
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # products in bf16, not in fp32 copies
        optim = config.optim
        optimizer = torch.optim.AdamW(parameter_groups(network, optim), betas=optim.betas, eps=optim.eps)
        self.device = processes.device
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=render(config, processes.world_size),
            dist_init_required=False,
        )

    def step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this process's micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        steps: list[dict[str, Tensor]] = []
        for batch in micro_batches:
            on_device = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            loss, parts = self.engine(on_device)
            self.engine.backward(loss)
            self.engine.step()
            steps.append({"loss": loss.detach(), **parts})
        norm = self.engine.get_global_grad_norm()  # None, a float or a tensor, depending on the ZeRO stage
        losses = {name: torch.stack([step[name].float() for step in steps]).mean() for name in steps[0]}
        return StepResult(losses=losses, grad_norm=float(norm or 0.0))


def render(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    training = config.training
    micro_batch = config.data.batch_size // (world_size * training.gradient_accumulation)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": config.optim.clip_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {"stage": training.zero_stage},
        # torch's AdamW under ZeRO: DeepSpeed's own CPU optimizer is compiled at start-up, which needs a compiler
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
