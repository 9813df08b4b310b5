"""Estimates memory per GPU, checkpoint sizes and operations of a run.

Weights, gradients and optimizer state follow from shapes. Activations are measured: the loss of the architecture in its
real widths is computed and differentiated with one and with two layers. Its peak memory grows linearly with depth
(exactly, in all cases tried) and with the number of clips.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from model.config.schema import RunConfig, micro_batch_size
from model.losses import ROWS_AT_ONCE
from model.progress import progress
from model.tasks.build import build_meta_task
from model.tasks.decoders import decoder_shape
from model.training.flops import step_flops
from model.training.planning.peak_memory import PeakMemory

CPU_RUNTIME, GPU_RUNTIME = 0.65e9, 1.5e9
BUCKET = 5e8
"""Maximum number of elements in DeepSpeed's gradient buffer."""
CLIPS = (2, 4)
"""Numbers of clips in the measurements. Their difference separates the constant part, such as gradients."""
VOCABULARY = 512
"""Vocabulary size in the measurements; logits are added separately."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of each process."""

    runtime: float
    """Python, torch, DeepSpeed; on a GPU its context and NCCL's buffers (a guess, not measured on a GPU)."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Including temporary memory of the backward pass."""
    logits: float
    host: float
    """The copy for a checkpoint, in host memory."""

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
    """State of all processes, without names and offsets."""
    model_bytes: int
    """Weights of the published model, without names and offsets."""
    step_flops: float
    """Operations of all processes, forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    memory: float
    """Peak memory of the process, or of the GPU, in bytes."""
    step_s: float
    clip_s: float | None
    """CPU time to read and decode a clip; None if there are no shards."""


def plan_run(config: RunConfig, processes: int, *, on_cpu: bool = False) -> RunPlan:
    """Raises ConfigError if the batch size is not a multiple of the number of processes."""
    micro_batch, share = micro_batch_size(config, processes)
    task = build_meta_task(config)
    model = task.model
    trained = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    frozen = sum(weights.numel() for weights in model.parameters() if not weights.requires_grad)
    batch = task.example_batch(micro_batch)
    reads, passes = task.vision_passes(batch), task.decoder_passes(batch)
    width, vocabulary = _width(config), model.config.get_text_config().vocab_size
    stage, part = config.training.zero_stage, 1.0 / processes
    # in stage 0 with fp32 the optimizer updates the weights directly; otherwise it has an fp32 copy of them
    copies = 2 if stage == 0 and width == 4 else 3
    under_way = min(BUCKET, trained) * width + 4 * trained * part if stage else 0.0
    memory = Memory(
        runtime=CPU_RUNTIME if on_cpu else GPU_RUNTIME,
        weights=(trained + frozen) * width * (part if stage == 3 else 1.0),
        gradients=trained * width * (part if stage >= 2 else 1.0) + under_way,
        optimizer=4 * copies * trained * (part if stage else 1.0),
        activations=activation_bytes(config, micro_batch, on_cpu=on_cpu),
        logits=_logits_bytes(config, passes[0].scored, vocabulary),
        host=12 * trained * (part if stage else 1.0),
    )
    return RunPlan(
        processes=processes,
        micro_batch=micro_batch,
        trained=trained,
        frozen=frozen,
        memory=memory,
        checkpoint_bytes=12 * trained,
        model_bytes=width * (trained + frozen),
        step_flops=step_flops(task, reads, passes).total * share,
    )


def _logits_bytes(config: RunConfig, scored: int, vocabulary: int) -> float:
    """Logits and their gradients; those of a trained decoder are kept for the backward pass."""
    width = _width(config)
    kept = 0 if config.model.freeze_decoder else scored
    return float(min(ROWS_AT_ONCE, scored) * vocabulary * (4 + 2 * width) + kept * vocabulary * width)


def activation_bytes(config: RunConfig, clips: int, *, on_cpu: bool) -> float:
    """Peak memory of a forward and backward pass, without weights and gradients."""
    # settings that make no difference get one value, so that a cached measurement is reused
    common = {"zero_stage": 0, "gradient_accumulation": 1}
    alike = config.model_copy(update={"training": config.training.model_copy(update=common)})
    constant, per_clip = _growth(alike.model_dump_json(), on_cpu)
    return constant + clips * per_clip


@lru_cache
def _growth(config_json: str, on_cpu: bool) -> tuple[float, float]:
    """Constant bytes, and bytes per clip."""
    config = RunConfig.model_validate_json(config_json)
    text_layers = decoder_shape(config).num_hidden_layers
    # attention is fused on a GPU and in fp32 on a CPU, but not in bf16 on a CPU
    dtype = torch.bfloat16 if on_cpu and _width(config) == 2 else torch.float32
    scale = 0.5 if not on_cpu and _width(config) == 2 else 1.0
    few, many = CLIPS
    cases = [((1, 1), few), ((1, 1), many), ((1, 2), few)]
    if config.task != "language_modeling":
        cases.append(((2, 1), few))
    measured = progress(cases, total=len(cases), desc="measuring activations", unit="case")
    base, larger, deeper, *with_vision = [_peak(config, dtype, layers, clips) for layers, clips in measured]
    per_clip = (larger - base) / (many - few)
    constant = base - few * per_clip
    text = (deeper - base) / few
    vision = sum(peak - base for peak in with_vision) / few
    per_clip += (config.model.vision.num_hidden_layers - 1) * vision + (text_layers - 1) * text
    return scale * constant, scale * per_clip


def _peak(config: RunConfig, dtype: torch.dtype, layers: tuple[int, int], clips: int) -> int:
    torch.manual_seed(0)
    task = build_meta_task(config, "cpu", layers, vocabulary=VOCABULARY)
    model = task.model.to(dtype).train()
    for weights in model.parameters():
        if weights.requires_grad:  # gradients are counted separately
            weights.register_post_accumulate_grad_hook(lambda weights: setattr(weights, "grad", None))
    batch = task.normalize(task.example_batch(clips))
    with PeakMemory([*model.parameters(), *model.buffers(), *batch.values()]) as memory:
        task.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
    return memory.peak


def _width(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else 4
