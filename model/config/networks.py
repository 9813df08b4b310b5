"""The configuration of the networks, a part of model/config/schema.py."""

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class VisionConfig(Section):
    """The vision encoder. The defaults are those of the released models (see TimeSformerConfig)."""

    image_size: int = Field(224, ge=1)
    """Height and width of a frame, in pixels."""
    patch_size: int = Field(16, ge=1)
    """Height and width of a patch, in pixels."""
    num_frames: int = Field(4, ge=1)
    """Frames per clip."""
    hidden_size: int = Field(768, ge=1)
    """Width of the tokens."""
    num_hidden_layers: int = Field(12, ge=1)
    """Transformer blocks."""
    num_attention_heads: int = Field(8, ge=1)
    """Attention heads per block."""
    mlp_ratio: int = Field(4, ge=1)
    """Width of the MLP relative to `hidden_size`."""
    hidden_act: str = "gelu"
    """Activation of the MLP."""
    layer_norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the layer norms."""
    initializer_range: float = Field(0.015, gt=0)
    """Standard deviation of fresh weights."""
    clip_stem: bool = True
    """Use CLIP's stem: patches without a bias, and a layer norm before the first block."""


class AbstractorConfig(Section):
    """The abstractor of a fresh mPLUG-Owl, for the task instruction. Its width is that of the vision model."""

    num_hidden_layers: int = Field(6, ge=1)
    """Transformer layers."""
    num_attention_heads: int = Field(16, ge=1)
    """Attention heads per layer."""
    intermediate_size: int = Field(4096, ge=1)
    """Width of the MLP, of which two thirds are used, rounded up to a multiple of 256."""
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    """Dropout of the attention, if the abstractor is trained."""


class LoraConfig(Section):
    """Low-rank updates of a frozen decoder (LoRA), for the task instruction."""

    rank: int = Field(0, ge=0)
    """Rank of the updates. 0: no LoRA."""
    alpha: int = Field(32, ge=1)
    """The updates are scaled by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout of their input."""


class ModelConfig(Section):
    """The networks, and the weights that they start from."""

    decoder: str = ""
    """Folder or s3:// URI of the causal decoder and its tokenizer, in transformers format; of the tokenizer alone, if
    the decoder is trained from scratch."""
    init_from: str = ""
    """Folder or URI of a trained model to start from: an mPLUG-Video, whose position embeddings are resized to
    `vision.image_size` and `vision.num_frames`, or for the task instruction an mPLUG-Owl."""
    vision_weights: str = ""
    """Folder or URI of an image encoder to start from; `mplug convert` makes one from CLIP. Empty: random weights."""
    vision: VisionConfig = VisionConfig()
    text: dict[str, int | float | bool | str] = {}
    """Transformers configuration of the decoder, including `model_type`. A decoder that is trained from scratch is
    built from it; otherwise `decoder` must match it."""
    abstractor: AbstractorConfig = AbstractorConfig()
    lora: LoraConfig = LoraConfig()
    system: str = ""
    """First sentence of a conversation that has no system message. Empty: that of `init_from`, or of mPLUG-Owl."""
    num_queries: int = Field(128, ge=1)
    """Learned queries of the abstractor, which is the number of tokens in the visual prefix."""
    query_norm: bool = False
    """Apply a layer norm to the visual prefix."""
    use_contrastive: bool = False
    """Add the contrastive loss to pre-training."""
    contrastive_size: int = Field(256, ge=1)
    """Width of the space in which clips and texts are compared."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of contrastive losses."""
    freeze_decoder: bool = True
    """Train only the visual side, as published."""
    freeze_vision: bool = False
    """Train only the temporal parts of the vision encoder; with the task instruction, nothing of it."""
    freeze_abstractor: bool = False
    """Do not train the abstractor and its queries, for the task instruction."""
    decoder_dropout: bool = False
    """Keep dropout in a frozen decoder, as the original code does."""
