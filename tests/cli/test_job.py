"""The `mplug job` commands, against a Kubernetes API server in memory."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.paths import MPLUG, ROOT
from tests.helpers.pod_templates import CPU

TRAIN = ["train", "tiny_pretraining", "data.shards=s", "model.decoder=d"]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kube(tmp_path / "kubeconfig") as server:
        yield server


def mplug(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([MPLUG, "job", *arguments], capture_output=True, text=True, env=os.environ, timeout=120)


def test_apply_watch_logs_and_cancel_of_a_job(kube: FakeKube) -> None:
    kube.put("podtemplates", CPU)
    applied = mplug("apply", "--nodes", "2", *TRAIN)
    name = applied.stdout.strip()
    assert (name, applied.returncode) == (kube.wait_for("pytorchjobs")[0]["metadata"]["name"], 0), applied.stderr
    labels = {"training.kubeflow.org/job-name": name, "training.kubeflow.org/replica-type": "master"}
    kube.pod(f"{name}-master-0", labels, phase="Succeeded")
    kube.log(f"{name}-master-0", "step 1")
    assert mplug("logs", name).stdout == "step 1\n"
    kube.conclude("pytorchjobs", name, "Succeeded")
    watched = mplug("watch", name)
    assert (watched.returncode, watched.stdout) == (0, "step 1\n"), watched.stderr
    assert mplug("cancel", name).stdout == f"{name} was removed\n"
    assert ("mplug", "pytorchjobs", name) not in kube.objects


def test_watching_a_failed_job_fails(kube: FakeKube) -> None:
    kube.put("podtemplates", CPU)
    name = mplug("apply", "evaluate", "s3://m", "s3://s", "--split", "val").stdout.strip()
    assert kube.wait_for("jobs")[0]["spec"]["template"]["spec"]["containers"][0]["args"][-2:] == ["--split", "val"]
    kube.conclude("jobs", name, "Failed", "Job has reached the specified backoff limit")
    watched = mplug("watch", name)
    assert watched.returncode == 1
    assert watched.stderr.splitlines()[-1].startswith(f"error: Job {name} has failed: Job has reached the specified")


def test_a_missing_pod_template_is_a_one_line_error(kube: FakeKube) -> None:
    without_shape = mplug("apply", *TRAIN)
    assert without_shape.returncode == 1
    assert without_shape.stderr == (
        "error: namespace mplug has no PodTemplate training: `kubectl apply -k` an overlay of k8s/ first.\n"
    )
    assert "has no job named other" in mplug("watch", "other").stderr


def test_a_missing_cluster_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    ended = mplug("cancel", "job")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert ended.stderr.startswith("error: no cluster is configured:")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here, which builds the overlays")
def test_a_manifest_is_rendered_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    rendered = mplug("render", "--overlay", str(ROOT / "k8s/overlays/local"), "--name", "tiny", "--nodes", "2", *TRAIN)
    manifest = yaml.safe_load(rendered.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"], manifest["metadata"]["namespace"]) == (
        "PyTorchJob",
        "tiny",
        "mplug",
    )
