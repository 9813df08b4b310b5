"""Configurations of vision model, abstractor and the whole model. They read the published config.json."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

IMAGE_ID, VIDEO_ID = -1, -2
"""Token IDs at the positions of media. They are not in the vocabulary."""
MEDIA_IDS = {"image": IMAGE_ID, "video": VIDEO_ID}


@strict
class MplugOwlVisionConfig(PreTrainedConfig):
    """The vision model. The defaults are those of the published model, CLIP ViT-L/14."""

    model_type = "mplug_owl_vision_model"
    base_config_key = "vision_config"

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


@strict
class MplugOwlVisualAbstractorConfig(PreTrainedConfig):
    """The visual abstractor. Its width must be that of the vision model."""

    model_type = "mplug_owl_visual_abstract"
    base_config_key = "visual_abstractor_config"

    hidden_size: int = 1024
    encoder_hidden_size: int = 1024
    """Width of the vision model."""
    intermediate_size: int = 4096
    """Width of an MLP before it is reduced to that of a gated one, see `mlp_size`."""
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def mlp_size(self) -> int:
        """Width of the gated MLP: two thirds of `intermediate_size`, rounded up to a multiple of 256.

        2816 is already reduced: the published configuration stores 4096 or 2816 for the same weights.
        """
        if self.intermediate_size == 2816:
            return 2816
        return -(-int(2 * self.intermediate_size / 3) // 256) * 256


@strict
class MplugOwlConfig(PreTrainedConfig):
    """Vision model, abstractor and decoder. `text_config` can be any causal decoder of transformers."""

    model_type = "mplug-owl"
    sub_configs = {
        "vision_config": MplugOwlVisionConfig,
        "visual_abstractor_config": MplugOwlVisualAbstractorConfig,
        "text_config": AutoConfig,
    }

    vision_config: Any = None
    visual_abstractor_config: Any = None
    text_config: Any = None
    num_query_tokens: int = 64

    def __post_init__(self, **kwargs: object) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = MplugOwlVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.visual_abstractor_config, PreTrainedConfig):
            self.visual_abstractor_config = MplugOwlVisualAbstractorConfig(**(self.visual_abstractor_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        self.text_config.name_or_path = ""  # a folder of this machine
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        vision, abstractor = self.vision_config.hidden_size, self.visual_abstractor_config
        if {abstractor.hidden_size, abstractor.encoder_hidden_size} != {vision}:
            raise ValueError(
                "hidden_size and encoder_hidden_size of visual_abstractor_config must be the hidden_size of "
                f"vision_config, {vision}, but they are {abstractor.hidden_size} and {abstractor.encoder_hidden_size}."
            )
        # published files repeat the settings of the decoder at the top
        repeated = self.text_config.to_dict().keys() | {"__slotnames__"}
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in repeated})

    @property
    def media_length(self) -> int:
        """Vectors per image or video: one for each query, and an end vector."""
        return self.num_query_tokens + 1


# AutoTokenizer and AutoConfig read the configuration of a model folder, and must know its model type
AutoConfig.register(MplugOwlConfig.model_type, MplugOwlConfig)
