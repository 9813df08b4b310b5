"""DeepSpeed behind one interface: a training step over micro-batches. Only this file and zero.py import deepspeed."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from model.config.schema import RunConfig, micro_batch_size
from model.data.loading.loader import Batch, on_device
from model.distributed import Processes
from model.mplug_video.modeling import compile_layers
from model.tasks.base import TaskNetwork
from model.tasks.metrics import Prediction
from model.training.clock import Clock
from model.training.optim import ClippingAdamW, parameter_groups
from model.training.zero import prepare_start, refresh_weights, trained_state


@dataclass(frozen=True, kw_only=True)
class StepResult:
    losses: dict[str, Tensor]
    """`loss` and its parts by name: means over the micro-batches of this process."""
    grad_norm: float
    """Norm of the gradients of all processes, before clipping."""
    applied: bool
    """False if gradients were not finite. Then no weight has changed on any process."""


class Engine:
    """Trains the network of a task. ZeRO shards the optimizer state; frozen weights have none."""

    def __init__(self, network: TaskNetwork, config: RunConfig, processes: Processes) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        prepare_start()
        if processes.device.type == "cpu" and config.training.precision == "bf16":
            # in bf16, torch 2.13's fused CPU attention is 3 to 7 times slower than matrix products
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # products in bf16, not in fp32 copies
        optim = config.optim
        # a learning rate of 0, because DeepSpeed may already make an update in initialize
        groups = [{**group, "lr": 0.0} for group in parameter_groups(network, optim)]
        if config.training.compile:
            compile_layers(network)
        self.device, self.stage = processes.device, config.training.zero_stage
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=ClippingAdamW(
                groups, betas=optim.betas, eps=optim.eps, max_norm=_own_clipping(config), fused=True
            ),
            config=deepspeed_config(config, processes.world_size),
            dist_init_required=False,
        )
        self.state = trained_state(network, self.optimizer, self.stage, processes.rank)
        self.state.updates = 0  # in stage 0 with bf16, DeepSpeed has made an update with zero gradients

    def step(self, micro_batches: Sequence[Batch], lr: float, clock: Clock) -> StepResult:
        """One optimizer step over the micro-batches of this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        steps: list[dict[str, Tensor]] = []
        for batch in micro_batches:
            with clock.section("forward"):
                loss, parts = self.engine(on_device(batch, self.device))
            with clock.section("backward"):
                self.engine.backward(loss)
            with clock.section("optimizer"):
                self.engine.step()
            steps.append({"loss": loss.detach(), **parts})
        losses = {name: torch.stack([step[name].float() for step in steps]).mean() for name in steps[0]}
        norm = self.engine.get_global_grad_norm()  # a float or a tensor, depending on the ZeRO stage
        return StepResult(losses=losses, grad_norm=float(norm or 0.0), applied=self.engine.was_step_applied())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switches the network to evaluation mode, without gradients, for the duration of the block."""
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its parts for an evaluation batch."""
        loss, parts = self.engine(on_device(batch, self.device))
        return {"loss": loss, **parts}

    def predict(self, batch: Batch) -> list[Prediction]:
        """Predictions, made by the engine's forward pass, which gathers the weights under ZeRO-3."""
        return self.engine(on_device(batch, self.device), predict=True)

    def restored(self, updates: int) -> None:
        """Continues from the values written to `state`, after `updates` updates of Adam. All processes must call it."""
        self.state.updates = updates
        refresh_weights(self.optimizer, self.stage)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gathers all weights on every process for the duration of the block. All processes must enter it."""
        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else nullcontext():
            yield


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run."""
    training = config.training
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size)[0],
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": 0.0 if _own_clipping(config) is not None else config.optim.clip_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "zero_optimization": {"stage": training.zero_stage},
        # use torch's AdamW under ZeRO: DeepSpeed compiles its own CPU optimizer at start-up, which needs a compiler
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _own_clipping(config: RunConfig) -> float | None:
    """The maximum norm if the optimizer itself must clip: in stage 0 with fp32, DeepSpeed computes no gradient norm and
    applies updates that are not finite."""
    plain = config.training.zero_stage == 0 and config.training.precision == "fp32"
    return config.optim.clip_grad_norm if plain else None
