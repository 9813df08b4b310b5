"""Runs a pipeline with kfp's local runner: the cluster's definition, one subprocess per step, on this machine."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import components
import model
import pipelines
from model import storage
from model.config.load import load_config
from model.errors import FAILURES, ConfigError, ProcessFailedError
from model.restart_policy import is_restartable
from pipelines.catalog import load_pipeline, pipeline_parameters, with_defaults

DEMO_PRESETS = ("tiny_decoder", "tiny_pretraining", "tiny_classification", "tiny_retrieval", "tiny_captioning")
FIXED = {"name", "task", "output", "data.shards", "model.decoder", "model.init_from"}
LOCAL_DEFAULTS = {"nodes": 0, "processes": 2, "tracking_uri": "", "gpus": 0, "image": "", "cpu_image": ""}
"""Defaults of a pipeline's parameters on one machine."""


def run_pipeline(name: str, folder: Path, given: Mapping[str, Any]) -> None:
    """Runs pipeline `name`; stages that finished before with the same inputs and code come from the cache."""
    known = pipeline_parameters(name)
    values = {
        **{key: value for key, value in LOCAL_DEFAULTS.items() if key in known},
        "code_version": code_version(),
        **given,
    }
    for data, version in (("source", "source_version"), ("raw", "raw_version")):
        if data in values and version not in values:
            values[version] = source_version(values[data])
    validate_arguments(with_defaults(name, values))
    from kfp import local  # a second of imports: only where a pipeline runs

    folder.mkdir(parents=True, exist_ok=True)
    for category in (UserWarning, RuntimeWarning):  # what has no effect here, and the name of the image
        warnings.filterwarnings("ignore", category=category, module="kfp")
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "outputs"),
        enable_caching=True,
        cache_root=str(folder / "cache"),
    )
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as failures:
        os.environ[FAILURES] = failures.name
        try:
            load_pipeline(name)(**values)
        except RuntimeError as error:
            raise pipeline_failure(error, [json.loads(line) for line in failures]) from error
        finally:
            del os.environ[FAILURES]


def pipeline_failure(error: RuntimeError, noted: Sequence[tuple[int, str]]) -> ProcessFailedError:
    """What kfp says, with what the steps have noted: what is permanent decides, and of that the first."""
    said = " ".join(str(error).split())
    if not noted:  # killed
        return ProcessFailedError(said)
    code, message = min(noted, key=lambda failure: is_restartable(failure[0]))
    return ProcessFailedError(f"{message}\n{said}", code)


def validate_arguments(values: Mapping[str, Any]) -> None:
    """Refuses before anything starts what some stage would refuse later. Raises ConfigError."""
    root, overrides = values.get("root", ""), values.get("overrides", [])
    if values.get("tracking_uri") and not storage.is_s3(root):
        raise ConfigError(f"root must be an s3:// URI where MLflow is used: its registry takes no folders, got {root}.")
    fixed = [key for key in (str(item).partition("=")[0] for item in overrides) if key in FIXED]
    if fixed:
        raise ConfigError(
            "\n".join(f"{key} is set by the pipeline for each stage, it cannot be overridden." for key in fixed)
        )
    own = [values["config"]] if "config" in values else DEMO_PRESETS
    for preset in values.get("configs") or own:
        load_config(preset, ["data.shards=set-later", "model.decoder=set-later", *overrides])


def source_version(source: str) -> str:
    """A digest of names and sizes below `source`, or of a list's own bytes: other data run every stage again.

    Empty where looking would be a download.
    """
    if not storage.is_s3(source) and not Path(source).exists():
        return ""
    if Path(source).is_file():
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]
    entries = "\n".join(f"{entry.path} {entry.size}" for entry in storage.walk(source))
    return hashlib.sha256(entries.encode()).hexdigest()[:12]


def code_version() -> str:
    """A digest of our packages' files: new code runs every stage again, a new commit of the README none."""
    state = hashlib.sha256()
    for package in (model, components, pipelines):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in {".py", ".yaml", ".j2", ".json"}:
                state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()[:12]
