"""Runs the pipeline with kfp's local runner: the cluster's definition, one subprocess per step, on this machine."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import components
import model
import pipelines
from model.exits import StageError


def run(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Runs all stages; those that finished before with the same inputs and code come from the cache."""
    from kfp import local  # a second of imports: only where a pipeline runs

    from pipelines.mplug_video import mplug_video

    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="kfp")
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder / "outputs"),
        enable_caching=True,
        cache_root=str(folder / "cache"),
    )
    try:
        mplug_video(**arguments, code_version=code_version())
    except RuntimeError as error:
        raise StageError(" ".join(str(error).split())) from error


def code_version() -> str:
    """A digest of our packages' files: new code runs every stage again, a new commit of the README none."""
    state = hashlib.sha256()
    for package in (model, components, pipelines):
        root = Path(package.__file__ or "").parent
        for path in sorted(root.rglob("*")):
            if path.suffix in {".py", ".yaml", ".j2"}:
                state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()[:12]
