import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from typer.main import get_command

from pipelines.cli import app

MPLUG = str(Path(sys.executable).with_name("mplug"))


def commands(group=None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    group = group or get_command(app)
    if not hasattr(group, "commands"):
        return [path]
    return [leaf for name, child in group.commands.items() for leaf in commands(child, (*path, name))]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_teaches_by_an_example_that_names_the_command(path: tuple[str, ...]) -> None:
    group = get_command(app)
    for name in path:
        group = group.commands[name]
    assert "Example: `" in (group.help or "")
    assert f"mplug {' '.join(path)}" in (group.help or "")


def test_the_command_line_answers_without_loading_torch() -> None:
    code = "import sys, pipelines.cli; print([name for name in ('torch', 'kfp', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    subprocess.run([MPLUG, "pipeline", "compile", str(out)], check=True, capture_output=True)
    return out


def test_the_pipeline_compiles_to_the_same_bytes(compiled: Path, tmp_path: Path) -> None:
    subprocess.run([MPLUG, "pipeline", "compile", str(tmp_path / "again.yaml")], check=True, capture_output=True)
    assert (tmp_path / "again.yaml").read_bytes() == compiled.read_bytes()


def test_the_compiled_pipeline_is_a_valid_specification_that_installs_nothing(compiled: Path) -> None:
    spec = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert parsed.pipeline_info.name == "mplug-video"
    assert "pip install" not in compiled.read_text(encoding="utf-8")


def test_every_parameter_of_the_pipeline_is_explained(compiled: Path) -> None:
    spec = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {"source", "root", "tracking_uri", "processes", "overrides"} <= set(parameters)
    assert all(parameter.get("description") for parameter in parameters.values())
