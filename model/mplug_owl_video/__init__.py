"""The BloomZ family of mPLUG-Video: mPLUG-Owl's video model with a causal decoder, for conversations about clips."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.mplug_owl_video.configuration import (
        MplugOwlConfig,
        MplugOwlVisionConfig,
        MplugOwlVisualAbstractorConfig,
    )
    from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration
    from model.mplug_owl_video.processing import MplugOwlImageProcessor, MplugOwlProcessor

__all__ = [
    "MplugOwlConfig",
    "MplugOwlForConditionalGeneration",
    "MplugOwlImageProcessor",
    "MplugOwlProcessor",
    "MplugOwlVisionConfig",
    "MplugOwlVisualAbstractorConfig",
]


def __getattr__(name: str) -> Any:
    """Imports the classes above on first use: modules of transformers with networks take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    kind = "configuration" if name.endswith("Config") else "processing" if name.endswith("Processor") else "modeling"
    return getattr(import_module(f"{__name__}.{kind}"), name)
