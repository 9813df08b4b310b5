"""Trains a tiny preset in seconds with the real launcher."""

from pathlib import Path

from model import manifest
from model.config.load import load_config
from model.config.schema import RunConfig
from model.training.launch import launch

TINY = [
    "training.precision=fp32",
    "data.batch_size=8",
    "optim.warmup_steps=0",
    "training.log_every=1",
    "data.workers=0",
]
"""Overrides that shorten a tiny preset to seconds; tests add training.steps."""


def train(preset: str, root: Path, settings: list[str], *, processes: int = 1, steps: int = 2) -> str:
    """Trains in separate processes like `mplug train`; returns the URI of the model."""
    overrides = [*TINY, f"training.steps={steps}", f"output={root}", *settings]
    assert launch(preset, overrides, processes) == 0
    return manifest.latest_version(f"{root}/models/{load_config(preset, overrides).name}")


def pretraining_config(decoder: str, *overrides: str) -> RunConfig:
    common = [f"model.decoder={decoder}", "data.shards=unused", "data.batch_size=2", "model.use_contrastive=false"]
    return load_config("tiny_pretraining", [*common, "optim.warmup_steps=0", *overrides])
