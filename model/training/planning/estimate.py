"""What a run will take, before it is launched: memory per GPU, checkpoints, operations.

Weights, gradients and optimizer state follow from shapes. Activations are measured here: the loss of the architecture
in its real widths is computed and differentiated with one layer and with two, and what that takes at most goes on
linearly with the depth (to the byte, where tried) and with the clips.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from model.config.schema import RunConfig, micro_batch_size
from model.tasks.build import build_meta_task, decoder_shape
from model.training.flops import step_flops
from model.training.planning.peak_memory import PeakMemory

CPU_RUNTIME, GPU_RUNTIME = 0.65e9, 1.5e9
BUCKET = 5e8
"""Elements of DeepSpeed's buffer for gradients under way, at most."""
LOGIT_ROWS = 512
"""Tokens that have logits at the same time, with their gradient, in fp32 and in the weights' precision."""
CLIPS = (2, 4)
"""Of the measurements. What does not grow with the clips, as a gradient of weights, shows between them."""
VOCABULARY = 512
"""Words in the measurement: the logits' share is added by hand."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of each process."""

    runtime: float
    """Python, torch, DeepSpeed; on a GPU, its context and the buffers of NCCL (a guess: none was at hand)."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """And what the backward pass holds beside them for a moment."""
    logits: float
    host: float
    """The copy that a checkpoint is written from: beside the rest on a CPU, in the host's memory else."""

    @property
    def device(self) -> float:
        return self.runtime + self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run on `processes` processes, one per GPU."""

    processes: int
    micro_batch: int
    trained: int
    """Parameters."""
    frozen: int
    memory: Memory
    checkpoint_bytes: int
    """State of all processes together; names and offsets come on top."""
    model_bytes: int
    """Of the published model's weights; names and offsets come on top."""
    step_flops: float
    """Of all processes together, forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    memory: float
    """Bytes that the process takes at most; on a GPU, of the GPU's memory."""
    step_s: float
    clip_s: float | None
    """One core's time to read and decode a clip; None where there are no shards."""


def plan_run(config: RunConfig, processes: int, *, on_cpu: bool = False) -> RunPlan:
    """Raises ConfigError where the batch cannot be shared by so many processes."""
    micro_batch, share = micro_batch_size(config, processes)
    task = build_meta_task(config)
    model = task.model
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    frozen = sum(weights.numel() for weights in model.parameters() if not weights.requires_grad)
    passes = task.decoder_passes(task.example_batch(micro_batch))
    width, vocabulary = _width(config), model.config.get_text_config().vocab_size
    stage, part = config.training.zero_stage, 1.0 / processes
    # in stage 0 and fp32 the weights are what the optimizer updates; else it has an fp32 copy of its own
    copies = 2 if stage == 0 and width == 4 else 3
    under_way = min(BUCKET, trained) * width + 4 * trained * part if stage else 0.0
    memory = Memory(
        runtime=CPU_RUNTIME if on_cpu else GPU_RUNTIME,
        weights=(trained + frozen) * width * (part if stage == 3 else 1.0),
        gradients=trained * width * (part if stage >= 2 else 1.0) + under_way,
        optimizer=4 * copies * trained * (part if stage else 1.0),
        activations=activation_bytes(config, micro_batch, on_cpu=on_cpu),
        logits=LOGIT_ROWS * vocabulary * (4 + 2 * width) if passes[0].scored else 0.0,
        host=12 * trained * (part if stage else 1.0),
    )
    return RunPlan(
        processes=processes, micro_batch=micro_batch, trained=trained, frozen=frozen, memory=memory,
        checkpoint_bytes=12 * trained, model_bytes=width * (trained + frozen),
        step_flops=step_flops(model, micro_batch, passes).total * share,
    )  # fmt: skip


def activation_bytes(config: RunConfig, clips: int, *, on_cpu: bool) -> float:
    """What a forward and backward pass takes at most beside weights and gradients."""
    # what a measurement does not depend on is made equal: one serves for all
    common = {"zero_stage": 0, "gradient_accumulation": 1}
    alike = config.model_copy(update={"training": config.training.model_copy(update=common)})
    constant, per_clip = _growth(alike.model_dump_json(), on_cpu)
    return constant + clips * per_clip


@lru_cache
def _growth(config_json: str, on_cpu: bool) -> tuple[float, float]:
    """Bytes that do not depend on the clips, and bytes per clip."""
    config = RunConfig.model_validate_json(config_json)
    text_layers = decoder_shape(config).num_hidden_layers
    # on a GPU attention is fused, as in fp32 on a CPU; bf16 on a CPU has its own way
    dtype = torch.bfloat16 if on_cpu and _width(config) == 2 else torch.float32
    scale = 0.5 if not on_cpu and _width(config) == 2 else 1.0
    few, many = CLIPS
    one = _peak(config, dtype, (1, 1), few)
    per_clip = (_peak(config, dtype, (1, 1), many) - one) / (many - few)
    constant = one - few * per_clip
    vision = 0.0 if config.task == "language_modeling" else (_peak(config, dtype, (2, 1), few) - one) / few
    text = (_peak(config, dtype, (1, 2), few) - one) / few
    per_clip += (config.model.vision.num_hidden_layers - 1) * vision + (text_layers - 1) * text
    return scale * constant, scale * per_clip


def _peak(config: RunConfig, dtype: torch.dtype, layers: tuple[int, int], clips: int) -> int:
    torch.manual_seed(0)
    task = build_meta_task(config, "cpu", layers, vocabulary=VOCABULARY)
    model = task.model.to(dtype).train()
    for weights in model.parameters():
        if weights.requires_grad:  # gradients are counted by themselves
            weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
    batch = task.normalize(task.example_batch(clips))
    with PeakMemory([*model.parameters(), *model.buffers(), *batch.values()]) as memory:
        task.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    return memory.peak


def _width(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4
