"""Runs a pipeline with kfp's local runner: the same definition as on a cluster, with one subprocess per step."""

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
"""Defaults of pipeline parameters on one machine."""


def run_pipeline(name: str, folder: Path, given: Mapping[str, Any]) -> None:
    """Runs pipeline `name`. Stages that finished earlier with the same inputs and code are taken from the cache."""
    known = pipeline_parameters(name)
    values = {
        **{key: value for key, value in LOCAL_DEFAULTS.items() if key in known},
        **_share_of_cores(known, given),
        "code_version": code_version(),
        **given,
    }
    for data, version in (("source", "source_version"), ("raw", "raw_version")):
        if data in values and version not in values:
            values[version] = source_version(values[data])
    validate_arguments(with_defaults(name, values))
    from kfp import local  # not at the top: the import takes a second

    folder.mkdir(parents=True, exist_ok=True)
    for category in (UserWarning, RuntimeWarning):  # about settings that the local runner ignores
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


def _share_of_cores(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Evaluations run side by side, one for each of `configs`."""
    if "evaluate_cpu" not in known:
        return {}
    configs = given.get("configs") or known["configs"]["defaultValue"]
    return {"evaluate_cpu": str(max(1, len(os.sched_getaffinity(0)) // len(configs)))}


def pipeline_failure(error: RuntimeError, noted: Sequence[tuple[int, str]]) -> ProcessFailedError:
    """kfp's error with message and code of the failed step: the first permanent failure, else the first failure."""
    kfp_message = " ".join(str(error).split())
    if not noted:  # killed
        return ProcessFailedError(kfp_message)
    code, message = min(noted, key=lambda failure: is_restartable(failure[0]))
    return ProcessFailedError(f"{message}\n{kfp_message}", code)


def validate_arguments(values: Mapping[str, Any]) -> None:
    """Raises the ConfigError that a stage would raise later."""
    root, overrides = values.get("root", ""), values.get("overrides", [])
    if values.get("tracking_uri") and not storage.is_s3(root):
        raise ConfigError(f"root must be an s3:// URI with MLflow, whose registry accepts no folders, got {root}.")
    fixed = [key for key in (str(item).partition("=")[0] for item in overrides) if key in FIXED]
    if fixed:
        raise ConfigError(
            "\n".join(f"{key} is set by the pipeline for each stage; it cannot be overridden." for key in fixed)
        )
    own = [values["config"]] if "config" in values else DEMO_PRESETS
    for preset in values.get("configs") or own:
        load_config(preset, ["data.shards=set-later", "model.decoder=set-later", *overrides])


def source_version(source: str) -> str:
    """A digest of names and sizes below `source`, or of the content of a list. Changed data run every stage again.

    Empty if computing it would need a download.
    """
    if not storage.is_s3(source) and not Path(source).exists():
        return ""
    if Path(source).is_file():
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]
    entries = "\n".join(f"{entry.path} {entry.size}" for entry in storage.walk(source))
    return hashlib.sha256(entries.encode()).hexdigest()[:12]


def code_version() -> str:
    """A digest of the files of our packages: changed code runs every stage again."""
    state = hashlib.sha256()
    for package in (model, components, pipelines):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in {".py", ".yaml", ".j2", ".json"}:
                state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()[:12]
