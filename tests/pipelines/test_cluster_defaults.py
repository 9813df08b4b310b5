"""Defaults of the cluster or an overlay take precedence over the compiled ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.errors import ConfigError
from pipelines.catalog import PIPELINES, parse_arguments, pipeline_parameters, with_defaults
from pipelines.cluster_defaults import arguments_on_cluster
from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.paths import ROOT
from tests.helpers.pod_templates import CPU

OVERLAYS = ROOT / "k8s" / "overlays"
BASE = yaml.safe_load((OVERLAYS.parent / "base" / "training" / "pipelines.yaml").read_text())["data"]
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here, which builds the overlays")
GIVEN = ["raw=s3://r", "pretrained=s3://p"]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kube(tmp_path / "kubeconfig") as server:
        yield server


def test_base_defaults_match_the_compiled_pipelines() -> None:
    known = {key: item for name in PIPELINES for key, item in pipeline_parameters(name).items()}
    assert set(BASE) <= set(known)
    for name in PIPELINES:
        own = {key: value for key, value in BASE.items() if key in pipeline_parameters(name)}
        assert parse_arguments(name, [f"{key}={value}" for key, value in own.items()]) == {
            key: pipeline_parameters(name)[key]["defaultValue"] for key in own
        }


def test_arguments_take_precedence_over_cluster_defaults(kube: FakeKube) -> None:
    kube.put("podtemplates", CPU, "team")
    addresses = {"MPLUG_ROOT": "s3://team/work", "MLFLOW_TRACKING_URI": "http://mlflow.team.svc:5000"}
    kube.put("configmaps", {"metadata": {"name": "mplug-config"}, "data": addresses}, "team")
    kube.put("configmaps", {"metadata": {"name": "mplug-pipelines"}, "data": {"gpus": "0", "shard_cpu": "2"}}, "team")
    found = arguments_on_cluster("benchmark", [*GIVEN, "namespace=team", "shard_cpu=1"])
    assert with_defaults("benchmark", found)["evaluate_memory"] == "48Gi"
    del found["code_version"]
    image = CPU["template"]["spec"]["containers"][0]["image"]
    assert found == {
        "raw": "s3://r",
        "pretrained": "s3://p",
        "namespace": "team",
        "root": "s3://team/work",
        "gpus": 0,
        "tracking_uri": "http://mlflow.team.svc:5000",
        "shard_cpu": "1",
        "image": image,
        "cpu_image": image,
    }


def test_the_default_namespace_is_that_of_the_context(kube: FakeKube, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(file.read_text().replace('"namespace": "mplug"', '"namespace": "team"'))
    kube.put("podtemplates", CPU, "team")
    kube.put("configmaps", {"metadata": {"name": "mplug-config"}, "data": {"MPLUG_ROOT": "s3://team/work"}}, "team")
    kube.put("configmaps", {"metadata": {"name": "mplug-pipelines"}, "data": {}}, "team")
    found = arguments_on_cluster("benchmark", GIVEN)
    assert (found["namespace"], found["root"]) == ("team", "s3://team/work")


def test_a_given_image_applies_to_all_steps(kube: FakeKube) -> None:
    found = arguments_on_cluster("benchmark", [*GIVEN, "image=x:1"])
    assert found["cpu_image"] == "x:1"
    assert arguments_on_cluster("benchmark", [*GIVEN, "image=x:1", "cpu_image=x:1-cpu"])["cpu_image"] == "x:1-cpu"


def test_a_cluster_without_an_overlay_is_a_warning(kube: FakeKube, caplog: pytest.LogCaptureFixture) -> None:
    assert set(arguments_on_cluster("benchmark", GIVEN)) == {"raw", "pretrained", "code_version"}
    assert "the defaults of the cluster cannot be read" in caplog.text


def test_an_invalid_cluster_default_is_reported(kube: FakeKube) -> None:
    kube.put("podtemplates", CPU)
    kube.put("configmaps", {"metadata": {"name": "mplug-config"}, "data": {}})
    kube.put("configmaps", {"metadata": {"name": "mplug-pipelines"}, "data": {"gpus": "many"}})
    with pytest.raises(ConfigError, match="gpus must be of type NUMBER_INTEGER, got 'many'"):
        arguments_on_cluster("benchmark", GIVEN)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["local", "production"])
@pytest.mark.parametrize("name", PIPELINES)
def test_an_overlay_provides_all_cluster_defaults(name: str, overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/none")
    found = arguments_on_cluster(name, [], OVERLAYS / overlay)
    assert found["image"].endswith("mplug-video/training:0.1.0")
    assert found["root"] == "s3://mplug/work"


@needs_kubectl
def test_steps_of_the_local_overlay_fit_a_small_node() -> None:
    from components.jobs.client import parse_amount

    found: dict[str, Any] = with_defaults("benchmark", arguments_on_cluster("benchmark", GIVEN, OVERLAYS / "local"))
    cores = [parse_amount(value) for key, value in found.items() if key.endswith("_cpu")]
    assert len(cores) >= 3
    assert sum(cores) <= 0.5  # of two cores, most of which Kubeflow Pipelines uses
    assert found["gpus"] == 0
    assert found["nodes"] == 1
