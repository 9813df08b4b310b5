"""The configuration of a run: every section and field with its default, its bounds and its meaning."""

from collections.abc import Iterator
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from model.errors import ConfigError
from model.restart_policy import MAX_ATTEMPTS

DATASETS = {
    "language_modeling": "pretrain",
    "pretraining": "pretrain",
    "classification": "classification",
    "retrieval": "retrieval",
    "matching": "retrieval",
    "captioning": "captioning",
}
"""Every task, model/tasks/<task>.py, and the dataset that it reads."""
TaskName = Literal[tuple(DATASETS)]  # type: ignore[valid-type]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class VisionConfig(Section):
    """The vision encoder; the defaults are the released models' (see TimeSformerConfig)."""

    image_size: int = Field(224, ge=1)
    patch_size: int = Field(16, ge=1)
    num_frames: int = Field(4, ge=1)
    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    hidden_act: str = "gelu"
    layer_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.015, gt=0)
    clip_stem: bool = True


class ModelConfig(Section):
    """Which networks, and where their weights come from."""

    decoder: str = ""
    """Folder or s3:// URI of the causal decoder and its tokenizer, in transformers' format."""
    init_from: str = ""
    """Folder or URI of a trained mPLUG-Video whose weights to start from. Its position embeddings are resized to
    `vision.image_size` and `vision.num_frames`."""
    vision_weights: str = ""
    """Folder or URI of an image encoder (`mplug convert` makes one of CLIP) to start from. Empty: random weights."""
    vision: VisionConfig = VisionConfig()
    text: dict[str, int | float | bool | str] = {}
    """The decoder's transformers configuration, `model_type` included. Builds the decoder where one is trained from
    nothing; elsewhere it says what `decoder` must be."""
    num_queries: int = Field(128, ge=1)
    """Learned queries of the abstractor: tokens of the visual prefix."""
    query_norm: bool = False
    """LayerNorm on the visual prefix."""
    use_contrastive: bool = False
    """Adds the contrastive loss to pre-training."""
    contrastive_size: int = Field(256, ge=1)
    """Width of the space in which clips and texts are compared."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of contrastive losses."""
    freeze_decoder: bool = True
    """Train the visual side only, as published."""
    freeze_vision: bool = False
    """Of the vision encoder, train only what reads over time."""
    decoder_dropout: bool = False
    """Dropout in a frozen decoder, as upstream leaves it on."""


class DataConfig(Section):
    """What is read, and how a clip becomes a tensor."""

    shards: str = ""
    """Folder or URI of a sharded dataset: holds one folder per split."""
    batch_size: int = Field(32, ge=1)
    """Clips per optimizer step, over all processes and accumulation steps."""
    workers: int = Field(1, ge=0)
    """Loader processes per training process; 0 reads in the training process."""
    read_ahead: int = Field(32, ge=1)
    """Clips that each loader process has under way from storage."""
    cache_gb: float = Field(0, ge=0)
    """Bound of a cache of clips below $MPLUG_CACHE, shared by all processes of a machine; 0 keeps none."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Decodes shards of original clips. decord gives the same pixels, slower, and wrong ones of damaged clips."""
    decode_deadline_s: float = Field(60, gt=0)
    """Longest time for one clip's frames."""
    max_read_failures: float = Field(0.001, ge=0, le=1)
    """Share of clips that may turn out unreadable; each is logged. More end the run."""
    max_length: int = Field(80, ge=4)
    """Longest text, in tokens."""
    crop_area: float = Field(0.5, gt=0, le=1)
    """Smallest share of the frame that a random training crop keeps."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest width / height of a crop."""
    crop_relative: bool = False
    """Aspect ratios relative to the frame's own, so that crops are squeezed as whole frames are in evaluation."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a mirrored training clip. 0 where texts speak of left and right."""
    augment_ops: int = Field(2, ge=0, le=9)
    """Random operations (contrast, shear, rotation, …) on each training clip."""
    augment_level: float = Field(5, ge=0, le=10)
    """Their strength: 5 shears by 0.15 and turns by 15 degrees."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up from 0, then a cosine (or a line) to `min_lr`."""

    lr: float = Field(1e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    """0: `warmup_epochs` say it."""
    warmup_epochs: float = Field(0, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    """Not applied to vectors: biases, norms and position embeddings."""
    clip_grad_norm: float = Field(3.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    vision_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of the vision encoder's spatial part (0.1 when it starts from CLIP)."""


class TrainingConfig(Section):
    """How long, in which precision and on how many processes' memory."""

    steps: int = Field(0, ge=0)
    """Optimizer steps. 0: `epochs` say it."""
    epochs: float = Field(1, ge=0)
    """Passes over the dataset; the clips of an incomplete last batch are left out."""
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimizer, 2 the gradients too, 3 the weights too."""
    gradient_accumulation: int = Field(1, ge=1)
    activation_checkpointing: tuple[Literal["vision", "abstractor", "decoder"], ...] = ()
    """Parts whose activations are computed again in the backward pass: slower, less memory."""
    compile: bool = False
    """Compiles the layers of vision encoder and decoder (torch.compile): faster on a GPU, slow to start. Needs a C
    compiler where it runs."""
    log_every: int = Field(10, ge=1)
    """Steps between two points of a metric."""
    consecutive_skips: int = Field(3, ge=1, validation_alias=AliasChoices("consecutive_skips", "skips_in_a_row"))
    """Consecutive steps without finite gradients after which the weights go back to the last checkpoint. Each such step
    is skipped and counted; the clips it saw are not seen again."""
    max_skips: int = Field(30, ge=0)
    """Skipped steps that a run may have; more end it."""
    profile: bool = False
    """Writes a torch profile of three steps to profiles/<name>.json.gz of the output."""


class CheckpointConfig(Section):
    """What a killed run goes on from. It does so by itself when it is started again, on any number of processes."""

    every: int = Field(500, ge=0)
    """Steps between two checkpoints. 0: only where the run is asked to end (SIGTERM), and at its end."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept; the best one is kept beside them."""
    max_attempts: int = Field(MAX_ATTEMPTS, ge=1)
    """Starts without a new checkpoint in between; one more ends with code 4, which no cluster restarts."""


class WatchdogConfig(Section):
    """Seconds that a part of a run may take. One process over its time ends all of them, with a code that says restart,
    after every one has printed where it stood."""

    setup_s: float = Field(1800, gt=0)
    """Start, weights and checkpoint included."""
    first_step_s: float = Field(1200, gt=0)
    step_s: float = Field(300, gt=0)
    """Any other step, waiting for its data included."""
    checkpoint_s: float = Field(1200, gt=0)
    """What a step waits for a checkpoint, and the final upload."""
    evaluation_s: float = Field(3600, gt=0)
    silence_s: float = Field(30, gt=0)
    """A process without a sign of life for so long is given up by the others."""


class EvaluationConfig(Section):
    """Evaluation while training. The best checkpoint by `metric` becomes the model, else the last."""

    every: int = Field(0, ge=0)
    """Steps between two evaluations, each with a checkpoint; 0: none."""
    shards: str = ""
    """Folder or URI of a sharded dataset; empty: data.shards."""
    split: str = "val"
    metric: str = ""
    """Decides which checkpoint is best: a metric of the task (`mplug evaluate` prints them) or `loss`, the default."""
    clips: int = Field(0, ge=0)
    """Clips of the split to read, from its start; 0: all."""


class TrackingConfig(Section):
    """MLflow. Metrics go to a journal first and to the server when it answers; an outage costs a run nothing."""

    uri: str = ""
    """Tracking server or sqlite:///file. Empty: no tracking, the journal only."""
    experiment: str = "mplug-video"
    pipeline: str = ""
    """Name of a pipeline's run: this one is nested under the newest of that name."""
    patience_s: float = Field(120, ge=0)
    """How long an ended run waits for a server that is down to take the last points."""


class RunConfig(Section):
    """One training run, resolved. Saved beside every model that comes out of it."""

    name: str = Field("run", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Names the run in MLflow and in the output's path."""
    task: TaskName = "pretraining"  # type: ignore[valid-type]
    seed: int = 42
    trial: int = Field(1, ge=1)
    """A run that is started again goes on from its checkpoints; with another number it starts from nothing."""
    code_version: str = ""
    """Names the code, where a pipeline runs it: with another one, too, a run starts from nothing."""
    output: str = "output"
    """Folder or URI under which models/<name>/ and checkpoints/<name>-…/ are written."""
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
            yield "model.text must describe the decoder to train (model_type, sizes), it is empty."
        if not model.decoder:
            yield "model.decoder must name the folder of the tokenizer, it is empty."
        if model.freeze_decoder:
            yield "model.freeze_decoder must be false for task language_modeling: nothing else could learn."
        if training.activation_checkpointing or training.compile:
            yield "training.activation_checkpointing and training.compile must be left out for task language_modeling."
    elif not model.decoder and not model.init_from:
        yield f"model.decoder or model.init_from must be set for task {config.task}, both are empty."
    if not data.shards:
        yield "data.shards must name a sharded dataset, it is empty. `mplug data shard` writes one."
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
        yield "training.steps or training.epochs must be set, both are 0."
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
