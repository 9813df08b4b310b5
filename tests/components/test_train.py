"""The step that trains, with a cluster in memory in place of the operator."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_kube import FakeKube, fake_kube

ROOT = Path(__file__).parent.parent.parent
SHAPE = yaml.safe_load((ROOT / "k8s/base/training/pod-template.yaml").read_text(encoding="utf-8"))
SHAPE["template"]["spec"]["containers"][0]["image"] = "registry.example/training:1"


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kube(tmp_path / "kubeconfig") as server:
        yield server


def test_the_step_of_a_pipeline_trains_on_the_cluster_and_returns_what_came_of_it(
    kube: FakeKube, pretrained: str, tmp_path: Path
) -> None:
    from components.train import train

    kube.put("podtemplates", SHAPE)
    models = tmp_path / "models" / "tiny-pretraining-scratch"

    def act() -> None:
        (made,) = kube.wait_for("pytorchjobs")
        shutil.copytree(Path(pretrained).parent, models)  # what the pods would publish
        kube.conclude("pytorchjobs", made["metadata"]["name"], "Succeeded")

    threading.Thread(target=act, daemon=True).start()
    uri = train.python_func(
        config="tiny_pretraining", shards={"pretrain": "s3://x"}, root=str(tmp_path), decoder="s3://d", pretrained="",
        init="scratch", nodes=2, processes=0, image="registry.example/training:2", namespace="mplug",
        deadline_hours=1.0, overrides=["optim.lr=1e-4"], tracking={"uri": "http://m", "parent_run": "r1"},
        code_version="1",
    )  # fmt: skip
    assert uri == str(models / (models / "latest").read_text())
    (job,) = kube.wait_for("pytorchjobs")
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example/training:2"
    assert {"tracking.uri=http://m", "tracking.parent_run=r1", "optim.lr=1e-4", f"output={tmp_path}"} <= set(
        container["args"]
    )
    assert job["spec"]["runPolicy"]["activeDeadlineSeconds"] == 3600
