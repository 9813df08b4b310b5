"""The configuration of a run: every section and field with its default, its bounds and its meaning."""

from collections.abc import Iterator
from typing import Literal

from pydantic import AliasChoices, Field, model_validator

from model.config.networks import ModelConfig, Section
from model.errors import ConfigError
from model.restart_policy import MAX_ATTEMPTS

TASK_DATASETS = {
    "language_modeling": "pretrain",
    "pretraining": "pretrain",
    "classification": "classification",
    "retrieval": "retrieval",
    "matching": "retrieval",
    "captioning": "captioning",
    "instruction": "instruction",
}
"""Every task, model/tasks/<task>.py, and the dataset that it reads."""


class DataConfig(Section):
    """The dataset, how it is read, and how training clips are augmented."""

    shards: str = ""
    """Folder or URI of a sharded dataset, which has one folder per split."""
    batch_size: int = Field(32, ge=1)
    """Clips per optimizer step, summed over all processes and accumulation steps."""
    workers: int = Field(1, ge=0)
    """Loader processes per training process. 0: the training process loads the data itself."""
    read_ahead: int = Field(32, ge=1)
    """Clips that each loader process requests from storage ahead of time."""
    cache_gb: float = Field(0, ge=0)
    """Size limit of the clip cache below $MPLUG_CACHE, which all processes of a machine share. 0: no cache."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Decoder for shards of original clips. decord returns the same pixels, is slower, and returns wrong pixels for
    damaged clips."""
    decode_deadline_s: float = Field(60, gt=0)
    """Time limit for decoding the frames of one clip."""
    max_read_failures: float = Field(0.001, ge=0, le=1)
    """Share of clips that may be unreadable. Each one is logged; the run fails above this share."""
    max_length: int = Field(80, ge=4)
    """Maximum length of a text, in tokens."""
    crop_area: float = Field(0.5, gt=0, le=1)
    """Smallest share of the frame that a random training crop keeps."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    crop_relative: bool = False
    """Take aspect ratios relative to that of the frame, so that crops are distorted like whole frames in evaluation."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring a training clip. Use 0 if texts mention left and right."""
    augment_ops: int = Field(2, ge=0, le=9)
    """Random operations (contrast, shear, rotation, …) applied to each training clip."""
    augment_level: float = Field(5, ge=0, le=10)
    """Strength of these operations: 5 shears by 0.15 and rotates by 15 degrees."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up from 0, then cosine or linear decay to `min_lr`."""

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Length of the warm-up in steps. 0: `warmup_epochs` applies."""
    warmup_epochs: float = Field(0, ge=0)
    """Length of the warm-up in epochs."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float = Field(1e-6, gt=0)
    """Epsilon of Adam."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay, which is not applied to biases, norms and position embeddings."""
    clip_grad_norm: float = Field(3.0, ge=0)
    """Maximum global gradient norm. 0: no clipping."""
    vision_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of the spatial part of the vision encoder (0.1 if it starts from CLIP)."""


class TrainingConfig(Section):
    """Length, precision and memory of a run."""

    steps: int = Field(0, ge=0)
    """Optimizer steps. 0: `epochs` applies."""
    epochs: float = Field(1, ge=0)
    """Passes over the dataset. An incomplete last batch is dropped."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations. The optimizer always works in fp32."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage: 0 replicates everything, 1 shards the optimizer state, 2 also gradients, 3 also weights."""
    gradient_accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step and process."""
    activation_checkpointing: tuple[Literal["vision", "abstractor", "decoder"], ...] = ()
    """Parts whose activations are recomputed in the backward pass: slower, less memory."""
    compile: bool = False
    """Compile the layers of vision encoder and decoder with torch.compile: faster on a GPU, slow to start. Needs a C
    compiler."""
    log_every: int = Field(10, ge=1)
    """Steps between two logged points of a metric."""
    consecutive_skips: int = Field(3, ge=1, validation_alias=AliasChoices("consecutive_skips", "skips_in_a_row"))
    """After this many consecutive steps without finite gradients, the weights are restored from the last checkpoint.
    Such steps are skipped and counted, and their clips are not repeated."""
    max_skips: int = Field(30, ge=0)
    """The run fails after more skipped steps than this."""
    profile: bool = False
    """Write a torch profile of three steps to <output>/profiles/<name>.json.gz."""


class CheckpointConfig(Section):
    """Checkpoints. A run that is started again resumes from the newest one, also on another number of processes."""

    every: int = Field(500, ge=0)
    """Steps between two checkpoints. 0: only on SIGTERM and at the end."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best one."""
    max_attempts: int = Field(MAX_ATTEMPTS, ge=1)
    """Maximum number of starts without a new checkpoint. The next start exits with code 4, which is not restarted."""


class WatchdogConfig(Section):
    """Time limits of the parts of a run, in seconds. If one process exceeds a limit, all processes dump their stacks
    and exit with a restartable code."""

    setup_s: float = Field(1800, gt=0)
    """From the start of the process to the first step, including weights and checkpoint."""
    first_step_s: float = Field(1200, gt=0)
    """The first step."""
    step_s: float = Field(300, gt=0)
    """Any later step, including the wait for its data."""
    checkpoint_s: float = Field(1200, gt=0)
    """The wait for a checkpoint, and the final upload."""
    evaluation_s: float = Field(3600, gt=0)
    """One evaluation."""
    silence_s: float = Field(30, gt=0)
    """A process that sends no heartbeat for this long counts as lost."""


class EvaluationConfig(Section):
    """Evaluation during training. The checkpoint that is best by `metric` becomes the model."""

    every: int = Field(0, ge=0)
    """Steps between two evaluations, each followed by a checkpoint. 0: no evaluation; the last checkpoint becomes the
    model."""
    shards: str = ""
    """Folder or URI of a sharded dataset. Empty: `data.shards`."""
    split: str = "val"
    """Split to evaluate."""
    metric: str = ""
    """Metric that selects the best checkpoint: one of the task (`mplug evaluate` prints them) or `loss` (default)."""
    clips: int = Field(0, ge=0)
    """Number of clips to read from the start of the split. 0: all."""


class TrackingConfig(Section):
    """MLflow. Metrics go to a local journal first and are sent in the background: an outage never stops a run."""

    uri: str = ""
    """Tracking server, or sqlite:///file. Empty: no tracking, only the journal."""
    experiment: str = "mplug-video"
    """MLflow experiment."""
    pipeline: str = ""
    """Name of a pipeline run. This run is nested under the newest run of that name."""
    run: str = ""
    """ID of an existing MLflow run to write to; its creator closes it. Empty: a new run."""
    patience_s: float = Field(120, ge=0)
    """How long a finished run waits for an unavailable server before it exits."""


class RunConfig(Section):
    """One training run, fully resolved. It is saved with every model that the run publishes."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Name of the run in MLflow and in output paths."""
    task: Literal[tuple(TASK_DATASETS)] = "pretraining"  # type: ignore[valid-type]
    """Objective; see model/tasks."""
    seed: int = 42
    """Seed of all randomness."""
    trial: int = Field(1, ge=1)
    """A run that is started again resumes from its checkpoints. Another number starts it from scratch."""
    code_version: str = ""
    """Version of the code, set by pipelines. Another version starts the run from scratch."""
    output: str = "output"
    """Folder or URI for models/<name>/ and checkpoints/<name>-…/."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _validate_combinations(self) -> "RunConfig":
        if problems := list(_impossible(self)):
            raise ValueError("\n".join(problems))
        return self


def _impossible(config: RunConfig) -> Iterator[str]:
    """Combinations that cannot run, each with its remedy."""
    model, data, optim, training = config.model, config.data, config.optim, config.training
    if config.task == "language_modeling":
        if not model.text:
            yield "model.text must describe the decoder to train (model_type, sizes), but it is empty."
        if not model.decoder:
            yield "model.decoder must name the folder of the tokenizer, but it is empty."
        if model.freeze_decoder:
            yield "model.freeze_decoder must be false for task language_modeling: nothing else could learn."
        if training.activation_checkpointing or training.compile:
            yield "training.activation_checkpointing and training.compile must be left out for task language_modeling."
    if config.task == "instruction":
        if model.lora.rank and not model.freeze_decoder:
            yield "model.freeze_decoder must be true with model.lora.rank, which trains updates of a frozen decoder."
        if model.freeze_decoder and model.freeze_vision and model.freeze_abstractor and not model.lora.rank:
            yield "one part must be trained: set model.lora.rank, or do not freeze everything."
    elif model.lora.rank or model.freeze_abstractor:
        yield f"model.lora.rank and model.freeze_abstractor must be left out for task {config.task}."
    if config.task != "language_modeling" and not model.decoder and not model.init_from:
        yield f"model.decoder or model.init_from must be set for task {config.task}, but both are empty."
    if not data.shards:
        yield "data.shards must name a sharded dataset, but it is empty. `mplug data shard` writes one."
    if data.batch_size % training.gradient_accumulation:
        yield (
            f"data.batch_size must be a multiple of training.gradient_accumulation, got {data.batch_size} and "
            f"{training.gradient_accumulation}."
        )
    if training.compile and training.zero_stage == 3:
        yield "training.compile must be false with training.zero_stage 3, which changes layers while they run."
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr must not exceed optim.lr, got {optim.min_lr} and {optim.lr}."
    if not training.steps and not training.epochs:
        yield "training.steps or training.epochs must be set, but both are 0."
    if training.steps and optim.warmup_steps >= training.steps:
        yield f"optim.warmup_steps must be below training.steps, got {optim.warmup_steps} and {training.steps}."
    if data.crop_aspect[0] > data.crop_aspect[1]:
        yield f"data.crop_aspect must be [narrowest, widest], got {list(data.crop_aspect)}."
    vision = model.vision
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
        size, unit = getattr(vision, whole), getattr(vision, part)
        if size % unit:
            yield f"model.vision.{whole} must be a multiple of model.vision.{part}, got {size} and {unit}."


def count_in_steps(config: RunConfig, clips: int) -> RunConfig:
    """The same run with its epochs counted in optimizer steps over a dataset of `clips`."""
    per_epoch = clips // config.data.batch_size
    steps = config.training.steps or int(config.training.epochs * per_epoch)
    warmup = config.optim.warmup_steps or int(config.optim.warmup_epochs * per_epoch)
    if steps <= warmup:
        raise ConfigError(
            f"a run over {clips} clips in batches of {config.data.batch_size} has {steps} steps, {warmup} of them "
            "warm-up; some must be left. Lower data.batch_size or the warm-up, or train for more epochs."
        )
    return config.model_copy(
        update={
            "training": config.training.model_copy(update={"steps": steps, "epochs": 0}),
            "optim": config.optim.model_copy(update={"warmup_steps": warmup, "warmup_epochs": 0}),
        }
    )


def micro_batch_size(config: RunConfig, processes: int) -> tuple[int, int]:
    """Clips of one forward pass, and forward passes of all processes per step."""
    share = processes * config.training.gradient_accumulation
    if config.data.batch_size % share:
        raise ConfigError(
            f"data.batch_size must be a multiple of processes x training.gradient_accumulation = {share}, "
            f"got {config.data.batch_size}."
        )
    return config.data.batch_size // share, share
