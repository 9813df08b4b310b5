"""The GPT-3 family of mPLUG-Video: TimeSformer, visual abstractor and a frozen causal decoder."""

from transformers import AutoConfig

from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.mplug_video.modeling import (
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
    MPlugVideoForRetrieval,
)
from model.mplug_video.processing import MPlugVideoProcessor

# AutoTokenizer and AutoConfig read the configuration beside the weights, and must know its kind
AutoConfig.register(MPlugVideoConfig.model_type, MPlugVideoConfig)

__all__ = [
    "MPlugVideoConfig",
    "MPlugVideoForClassification",
    "MPlugVideoForConditionalGeneration",
    "MPlugVideoForPreTraining",
    "MPlugVideoForRetrieval",
    "MPlugVideoProcessor",
    "TimeSformerConfig",
]
