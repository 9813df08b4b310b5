"""The GPT-3 family of mPLUG-Video: TimeSformer, visual abstractor and a frozen causal decoder."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
    from model.mplug_video.modeling import (
        MPlugVideoForClassification,
        MPlugVideoForConditionalGeneration,
        MPlugVideoForPreTraining,
        MPlugVideoForRetrieval,
    )
    from model.mplug_video.processing import MPlugVideoProcessor

__all__ = [
    "MPlugVideoConfig",
    "MPlugVideoForClassification",
    "MPlugVideoForConditionalGeneration",
    "MPlugVideoForPreTraining",
    "MPlugVideoForRetrieval",
    "MPlugVideoProcessor",
    "TimeSformerConfig",
]


def __getattr__(name: str) -> Any:
    """Imports the classes above on first use: loader processes need no networks, whose import takes 3 s."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    kind = "configuration" if name.endswith("Config") else "processing" if name.endswith("Processor") else "modeling"
    return getattr(import_module(f"{__name__}.{kind}"), name)
