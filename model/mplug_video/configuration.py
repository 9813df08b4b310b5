"""Shapes of the networks: one configuration for the vision encoder, one for the whole model.

Where the released models do something that a new model need not do, a field says so; `mplug convert` sets it.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

MATCHING_CLASSES = ["否", "是"]
"""The two classes of the matching head: whether a title belongs to a clip."""


@strict
class TimeSformerConfig(PreTrainedConfig):
    """The vision encoder. Defaults are the released models': CLIP ViT-B/16's widths, cut into 8 heads."""

    model_type = "mplug_video_timesformer"
    base_config_key = "vision_config"

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 4
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    """CLIP itself has 12; the released models re-cut its projections into 8 and were trained so."""
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    """CLIP itself has "quick_gelu"; the released models were trained with the exact one."""
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.015
    clip_stem: bool = True
    """CLIP's stem: patches without a bias, and a LayerNorm before the first block."""


@strict
class MPlugVideoConfig(PreTrainedConfig):
    """Vision encoder, abstractor and decoder. `text_config` may be any causal decoder that transformers knows."""

    model_type = "mplug_video"
    sub_configs = {"vision_config": TimeSformerConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    num_queries: int = 128
    """Learned queries of the abstractor: the length of the visual prefix that the decoder reads."""
    query_norm: bool = False
    """LayerNorm on the prefix (upstream's `connect_ln`, off in the released models)."""
    contrastive_size: int = 256
    use_contrastive: bool = False
    """Adds the contrastive loss to pre-training (off in the released models)."""
    temperature: float = 0.07
    """Initial value of the learned temperature of contrastive losses."""
    freeze_decoder: bool = True
    freeze_vision: bool = False
    """Of the vision encoder, train only what reads over time."""
    decoder_dropout: bool = False
    """Dropout in a frozen decoder: upstream leaves it on, where it only adds noise to what cannot learn from it."""
    class_names: list[str] | None = None
    """The categories, in the order of the classification head's outputs."""
    mean_answer_scores: bool = False
    """Scores an answer by the mean of its tokens' log likelihoods. The published figures take the sum, which favours
    short names."""
    released_beam_search: bool = False
    """Beam search as the released models' captions were made: no length normalisation and an early stop (see
    decoding.py). Otherwise transformers' own."""

    def __post_init__(self, **kwargs: object) -> None:
        vision = self.vision_config
        if not isinstance(vision, PreTrainedConfig):
            self.vision_config = TimeSformerConfig(**(vision or {}))
        text = self.text_config
        if not isinstance(text, PreTrainedConfig):
            text = dict(text or {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh"})
            self.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


# AutoTokenizer and AutoConfig read the configuration beside the weights, and must know its kind
AutoConfig.register(MPlugVideoConfig.model_type, MPlugVideoConfig)
