"""Parameter groups and the learning rate schedule of the original code."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from model.config.schema import OptimConfig

UNDECAYED = ("vision_encoder.pos_embed", "vision_encoder.cls_token", "vision_encoder.temporal_embed")


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step: linear warm-up from 0 to `lr`, then cosine or linear decay to `min_lr`.

    As in the original code, the first step has rate 0, and two steps have the peak rate.
    """
    if step < config.warmup_steps:
        return config.lr * step / max(config.warmup_steps - 1, 1)
    step, remaining = step - config.warmup_steps, total_steps - config.warmup_steps
    if config.schedule == "linear":
        return config.lr + (config.min_lr - config.lr) * step / max(remaining - 1, 1)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * step / remaining))


def parameter_groups(network: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by weight decay and learning rate scale.

    Vectors, biases and position embeddings have no weight decay. `vision_lr_scale` applies to the spatial part of the
    vision encoder.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        # the temperature is a vector only because ZeRO cannot shard a scalar; the original scalar has weight decay
        vector = parameter.ndim == 1 and not name.endswith("temperature")
        undecayed = vector or "bias" in name or name.endswith(UNDECAYED)
        spatial = "vision_encoder." in name and "temporal" not in name
        groups[0.0 if undecayed else config.weight_decay, config.vision_lr_scale if spatial else 1.0].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "lr": config.lr * scale}
        for (decay, scale), parameters in groups.items()
    ]


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips gradients if `max_norm` is given, and skips updates that are not finite.

    It reports both through the attributes of DeepSpeed's optimizers, `overflow` and `_global_grad_norm`.
    """

    def __init__(self, params: Any, *, max_norm: float | None, **options: Any) -> None:
        super().__init__(params, **options)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.max_norm is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self._global_grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.max_norm or math.inf))
            self.overflow = not math.isfinite(self._global_grad_norm)
        return None if self.overflow else super().step(closure)
