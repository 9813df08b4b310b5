"""The compiled pipelines and local runs."""

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from components.jobs.run_end import NAMESPACE, WORKFLOW
from model.errors import DATA, FAILED, OUTAGE, ConfigError, exit_code
from model.pipeline_run import RUN_ID
from pipelines.catalog import COMPILED, PIPELINES, compiled_documents, parse_arguments, with_defaults
from pipelines.local import pipeline_failure
from tests.helpers.paths import MPLUG

SHORT = ["training.steps=2", "training.log_every=1", "optim.warmup_steps=1", "data.batch_size=8"]


def tasks_of(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Tasks at all levels, except nested pipelines."""
    components = spec["components"]
    levels = [spec["root"], *components.values()]
    found = [item for level in levels for item in level.get("dag", {}).get("tasks", {}).items()]
    return [(name, task) for name, task in found if "executorLabel" in components[task["componentRef"]["name"]]]


def test_committed_pipelines_are_current(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([MPLUG, "pipeline", "compile", tmp_path], check=True, capture_output=True, env=environment)
    for name in PIPELINES:
        assert (tmp_path / f"{name}.yaml").read_bytes() == (COMPILED / f"{name}.yaml").read_bytes(), name


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_valid_and_installs_nothing(name: str) -> None:
    spec, platform = compiled_documents(name)
    assert json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec()).pipeline_info.name.startswith("mplug-video")
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    assert "pip install" not in (COMPILED / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_has_placement(name: str) -> None:
    spec, platform = compiled_documents(name)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    steps = spec["deploymentSpec"]["executors"]
    assert set(steps) == set(executors)
    for label, executor in executors.items():
        assert re.search(r"pipelinechannel--(cpu_)?image", steps[label]["container"]["image"]), label
        assert executor["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
        assert {mount["mountPath"] for mount in executor["emptyDirMounts"]} >= {"/tmp", "/cache"}
        assert executor["secretAsEnv"][0]["optional"]
        assert [item["name"] for item in executor["fieldPathAsEnv"]] == [RUN_ID, WORKFLOW, NAMESPACE]
    for step, task in tasks_of(spec):
        assert "retryPolicy" not in task, step


@pytest.mark.parametrize("name", PIPELINES)
def test_uncacheable_steps_are_not_cached(name: str) -> None:
    cached = {step: task["cachingOptions"] != {} for step, task in tasks_of(compiled_documents(name)[0])}
    for step in ("start-run", "finish-run", "gate"):
        assert not cached.get(step, False), step
    assert cached["shard"]
    assert cached["train"]


@pytest.mark.parametrize("name", PIPELINES)
def test_cached_steps_have_code_version_and_image_as_inputs(name: str) -> None:
    """The cache key of a step is its inputs; shards have a digest of their content."""
    for step, task in tasks_of(compiled_documents(name)[0]):
        if task["cachingOptions"] != {}:
            assert {"code_version", "base_image"} <= set(task["inputs"]["parameters"]), step


@pytest.mark.parametrize("name", PIPELINES)
def test_every_parameter_has_a_description(name: str) -> None:
    parameters = compiled_documents(name)[0]["root"]["inputDefinitions"]["parameters"]
    assert {"root", "tracking_uri", "processes", "overrides", "image", "code_version"} <= set(parameters)
    assert all(parameter.get("description") for parameter in parameters.values())


def names(tree: Any, key: str) -> set[str]:
    """The values of `key` at any depth."""
    if isinstance(tree, list):
        return {name for item in tree for name in names(item, key)}
    if not isinstance(tree, dict):
        return set()
    own = {tree[key]} if key in tree else set()
    return own.union(*(names(value, key) for value in tree.values()))


def placeholders(tree: Any) -> set[str]:
    return set(re.findall(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}", json.dumps(tree)))


def unknown_inputs(spec: dict[str, Any], platform: dict[str, Any]) -> list[str]:
    """Inputs of a task, its resources or platform configuration that the driver would not find."""
    components, executors = spec["components"], spec["deploymentSpec"]["executors"]
    on_kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = []
    for place, part in (("root", spec["root"]), *components.items()):
        around = set(part.get("inputDefinitions", {}).get("parameters", {}))
        for name, task in part.get("dag", {}).get("tasks", {}).items():
            label = components[task["componentRef"]["name"]].get("executorLabel", "")
            own = set(task.get("inputs", {}).get("parameters", {}))
            asked = names([task, on_kubernetes.get(label)], "componentInputParameter")
            found += [f"{place}: {name} asks for {item}" for item in asked - around]
            inserted = placeholders([task, executors.get(label, {}).get("container", {}).get("resources")])
            found += [f"{place}: {name} inserts {item}" for item in inserted - own]
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_input_exists_in_the_enclosing_component(name: str) -> None:
    """Otherwise, Kubeflow Pipelines fails with "parent DAG does not have input parameter"."""
    spec, platform = compiled_documents(name)
    assert unknown_inputs(spec, platform) == []


def test_inputs_used_only_by_resources_are_found() -> None:
    """The pipeline as compiled without `register_pipeline_channels`."""
    spec, platform = copy.deepcopy(compiled_documents("benchmark"))
    loop = next(part for name, part in spec["components"].items() if name.startswith("comp-for-loop"))
    del loop["inputDefinitions"]["parameters"]["pipelinechannel--gpus"]
    del loop["inputDefinitions"]["parameters"]["pipelinechannel--node_selector"]
    assert [item.rpartition(" ")[2] for item in sorted(unknown_inputs(spec, platform))] == [
        "pipelinechannel--gpus",
        "pipelinechannel--node_selector",
    ]


def test_step_sizes_are_parameters() -> None:
    for name in PIPELINES:
        spec, platform = compiled_documents(name)
        for label, executor in spec["deploymentSpec"]["executors"].items():
            for key, value in executor["container"].get("resources", {}).items():
                assert "{{" in json.dumps(value) or key == "accelerator", (name, label, key)
    spec, platform = compiled_documents("benchmark")
    accelerator = spec["deploymentSpec"]["executors"]["exec-evaluate"]["container"]["resources"]["accelerator"]
    assert accelerator["resourceType"] == "nvidia.com/gpu"
    assert placeholders(accelerator) == {"pipelinechannel--gpus"}
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-evaluate"]
    assert executor["nodeSelector"]["nodeSelectorJson"]
    assert executor["tolerations"][0]["tolerationJson"]
    assert {"mountPath": "/dev/shm", "medium": "Memory", "volumeName": "shm"} in executor["emptyDirMounts"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["sourc=x"], "The nearest is source."),
        (["nodes=many"], "nodes must be of type NUMBER_INTEGER, got 'many'"),
        (["nodes=true"], "nodes must be of type NUMBER_INTEGER"),
        (["overrides=x"], "overrides must be of type LIST"),
        (["source"], "must be parameter=value"),
        (["deadline_hours=long"], "deadline_hours must be of type NUMBER_DOUBLE, got 'long'"),
    ],
)
def test_all_invalid_arguments_are_reported_at_once(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments("pretrain", [*items, "nonsense=1"])
    assert message in str(caught.value)
    assert "nonsense=1 must be parameter=value of pipeline pretrain" in str(caught.value)


def test_missing_arguments_are_reported_with_a_description() -> None:
    with pytest.raises(ConfigError, match="decoder must be given: Folder or URI of the language model"):
        with_defaults("pretrain", {"source": "x", "image": "y", "cpu_image": "y", "code_version": "1"})


def test_values_are_parsed_by_parameter_type() -> None:
    items = ["source=1", "nodes=010", "partitions=[1/2, 2/2]", "deadline_hours=1e-1"]
    assert parse_arguments("pretrain", items) == {
        "source": "1",
        "nodes": 10,
        "partitions": ["1/2", "2/2"],
        "deadline_hours": 0.1,
    }
    assert parse_arguments("finetune", ["minimum={classification: 5e-1}"]) == {"minimum": {"classification": 0.5}}


def run(name: str, folder: Path, *items: str) -> "subprocess.CompletedProcess[str]":
    command = [MPLUG, "pipeline", "run", "--folder", str(folder / "kfp"), name, f"root={folder / 'work'}", *items]
    command += ["num_frames=8", "short_side=72", f"overrides={json.dumps(SHORT)}", "processes=1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_an_unknown_preset_starts_nothing(tmp_path: Path) -> None:
    ended = run("pretrain", tmp_path, "source=x", "source_version=1", "decoder=y", "config=tiny_pretrainin")
    assert ended.returncode == 2
    assert "did you mean tiny_pretraining?" in ended.stderr
    assert yaml.safe_load(ended.stdout or "null") is None


def test_a_pipeline_ends_with_message_and_code_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    ended = run("finetune", tmp_path, f"raw={tmp_path / 'raw'}", "pretrained=x", "configs=[tiny_classification]")
    assert ended.returncode == DATA
    assert f"error: {tmp_path}/raw must hold an annotation file (classification/train.csv" in ended.stderr
    assert "Inner task failed: 'shard'" in re.sub(r"\x1b\[[0-9;]*m", "", ended.stderr)
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_permanent_error_decides_among_parallel_steps() -> None:
    found = pipeline_failure(
        RuntimeError("kfp says so"), [(OUTAGE, "no answer"), (DATA, "bad data"), (FAILED, "a bug")]
    )
    assert (exit_code(found), str(found)) == (DATA, "bad data\nkfp says so")
    assert exit_code(pipeline_failure(RuntimeError("kfp says so"), [(OUTAGE, "no answer")])) == OUTAGE
