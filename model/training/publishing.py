"""Publishes a trained model as a folder that transformers can load."""

import tempfile
from pathlib import Path

from safetensors import SafetensorError

from model import manifest, storage
from model.config.schema import RunConfig
from model.errors import StorageError
from model.tasks.base import Task
from model.tracking import Run, flatten
from model.training.checkpoint import HISTORY


def publish_model(task: Task, config: RunConfig, run: Run, base_sha256: str) -> str:
    """Publishes the model with its configuration and its metrics history, and returns its URI."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            task.save(folder)
            (folder / HISTORY).write_bytes(run.history())
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"the model cannot be written to {folder.parent}: {error}. Free some space there."
            ) from error
        base = storage.join(config.output, "models", config.name)
        facts = {"config": config.model_dump(mode="json"), "run_id": run.opened_id(), "base_sha256": base_sha256}
        uri = manifest.publish_folder(folder, base, **facts)
    link_model(run, config, uri)
    return uri


def link_model(run: Run, config: RunConfig, uri: str) -> None:
    """Links the published model to the MLflow run."""
    run.tags({"model_uri": uri, "manifest_sha256": manifest.manifest_sha256(uri)})
    run.model(uri, config.training.steps, flatten(config.model_dump()))
