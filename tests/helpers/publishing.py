"""Publishes models that were not trained, for tests of what is done with a model."""

from pathlib import Path

import torch

from model import manifest
from model.config.load import load_config
from model.tasks.build import build_task


def publish_untrained(preset: str, settings: list[str], folder: Path, *, converted: bool = False) -> str:
    """The task's model with fresh visual weights; a `converted` one has no configuration with it."""
    torch.manual_seed(0)
    config = load_config(preset, settings)
    folder.mkdir(parents=True)
    build_task(config).save(folder)
    facts = {} if converted else {"config": config.model_dump(mode="json"), "run_id": ""}
    (folder / manifest.FILE).write_bytes(manifest.describe_folder(folder, **facts))
    return str(folder)
