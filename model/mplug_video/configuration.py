"""Configurations of the vision encoder and of the whole model.

Peculiarities of the released models have fields of their own, which `mplug convert` sets and new models leave off.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

MATCHING_CLASSES = ["否", "是"]
"""The two classes of the matching head: a title does not belong to a clip, or it does."""


@strict
class TimeSformerConfig(PreTrainedConfig):
    """The vision encoder. The defaults are those of the released models: the widths of CLIP ViT-B/16, with 8 heads."""

    model_type = "mplug_video_timesformer"
    base_config_key = "vision_config"

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 4
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    """CLIP has 12 heads. The released models were trained with its projections split into 8."""
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    """CLIP uses "quick_gelu". The released models were trained with the exact GELU."""
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.015
    clip_stem: bool = True
    """Use CLIP's stem: patches without a bias, and a LayerNorm before the first block."""


@strict
class MPlugVideoConfig(PreTrainedConfig):
    """Vision encoder, abstractor and decoder. `text_config` can be any causal decoder of transformers."""

    model_type = "mplug_video"
    sub_configs = {"vision_config": TimeSformerConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    num_queries: int = 128
    """Learned queries of the abstractor, which is the length of the visual prefix."""
    query_norm: bool = False
    """Apply a LayerNorm to the prefix (`connect_ln` of the original code, off in the released models)."""
    contrastive_size: int = 256
    use_contrastive: bool = False
    """Add the contrastive loss to pre-training (off in the released models)."""
    temperature: float = 0.07
    """Initial value of the learned temperature of contrastive losses."""
    freeze_decoder: bool = True
    freeze_vision: bool = False
    """Train only the temporal parts of the vision encoder."""
    decoder_dropout: bool = False
    """Keep dropout in a frozen decoder. The original code keeps it, which only adds noise."""
    class_names: list[str] | None = None
    """The categories, in the order of the classification head's outputs."""
    mean_answer_scores: bool = False
    """Score an answer by the mean of its token log likelihoods. The published figures use the sum, which favours short
    names."""
    released_beam_search: bool = False
    """Use the beam search of the released models, without length normalisation and with an early stop (decoding.py).
    Otherwise that of transformers."""

    def __post_init__(self, **kwargs: object) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = TimeSformerConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            text = self.text_config or {"model_type": "gpt2", "activation_function": "gelu_pytorch_tanh"}
            self.text_config = AutoConfig.for_model(**text)
        self.text_config.name_or_path = ""  # a folder of this machine
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


# AutoTokenizer and AutoConfig read the configuration of a model folder, and must know its model type
AutoConfig.register(MPlugVideoConfig.model_type, MPlugVideoConfig)
