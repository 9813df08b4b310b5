"""Runs the images of `make images` like a pod. Skipped without images or podman."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.jobs.manifests import Launch, load_pod_template, render_job
from pipelines.catalog import compiled_documents
from tests.helpers.operator_double import pod_of, replicas
from tests.helpers.paths import ROOT

TRAINING, MLFLOW = "localhost/mplug-video/training:0.1.0", "localhost/mplug-video/mlflow:0.1.0"
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp", "--network=none"]
HARDENED += ["--shm-size=2g", "--tmpfs=/cache:mode=1777"]


def podman(*arguments: str, check: bool = True) -> str:
    ended = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=300)
    assert not check or ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def missing() -> str:
    if not shutil.which("podman"):
        return "no podman here"
    for image in (TRAINING, MLFLOW):
        if subprocess.run(["podman", "image", "exists", image], capture_output=True).returncode:
            return f"{image} is not built here: make images"
    ended = subprocess.run(["podman", "run", "--rm", "--pull=never", TRAINING, "true"], capture_output=True, text=True)
    return "" if ended.returncode == 0 else f"podman cannot run a container here: {ended.stderr.strip()[-200:]}"


MISSING = missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def run(image: str, *command: str, volumes: tuple[str, ...] = ()) -> str:
    mounts = [f"--volume={volume}" for volume in volumes]
    return podman("run", "--rm", "--pull=never", *HARDENED, *mounts, image, *command)


@pytest.mark.parametrize("image", [TRAINING, MLFLOW])
def test_an_image_is_non_root_labelled_and_without_compiler(image: str) -> None:
    assert run(image, "id", "-u") == "10001\n"
    assert "none" in run(image, "sh", "-c", "command -v gcc cc g++ clang make || echo none")
    labels = json.loads(podman("image", "inspect", image))[0]["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert len(labels["org.opencontainers.image.revision"]) == 40


def test_mlflow_has_its_drivers() -> None:
    run(MLFLOW, "python3", "-c", "import psycopg2, boto3, prometheus_flask_exporter")
    assert "mlflow, version 3.17" in run(MLFLOW, "mlflow", "--version")


def test_the_training_image_runs_the_commands_of_mplug() -> None:
    assert "pretrain_1.3b" in run(TRAINING, "mplug", "presets")
    assert "Kubernetes cluster" in run(TRAINING, "mplug", "job", "--help")
    doctor = run(TRAINING, "mplug", "doctor", "--root=/tmp/work")
    assert "✓  storage" in doctor
    assert "✗" not in doctor


def test_the_training_image_runs_a_kubeflow_pipelines_step(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    container = compiled_documents("pretrain")[0]["deploymentSpec"]["executors"]["exec-start-run"]["container"]
    given = {"tracking_uri": "", "experiment": "e", "run_name": "r", "source": "s", "root": "/tmp/root"}
    outputs = {"parameters": {"Output": {"outputFile": "/out/Output"}}, "outputFile": "/out/executor_output.json"}
    asked = json.dumps({"inputs": {"parameterValues": given}, "outputs": outputs})
    command = [part.replace("{{$}}", asked) for part in container["command"] + container["args"]]
    run(TRAINING, *command, volumes=(f"{tmp_path}:/out",))
    answered = json.loads((tmp_path / "executor_output.json").read_text())
    assert answered["parameterValues"]["Output"] == {"uri": "", "experiment": "e", "pipeline": "r"}


@pytest.fixture
def network() -> Iterator[str]:
    podman("network", "create", "mplug-test")
    yield "mplug-test"
    podman("network", "rm", "--force", "mplug-test")


def test_two_pods_train_as_one(shards: dict[str, str], decoder: str, tmp_path: Path, network: str) -> None:
    """`podman kube play` runs the pods of a job: read-only, non-root, without capabilities."""
    pod_template, _ = load_pod_template(ROOT / "k8s" / "overlays" / "local")
    container = pod_template["template"]["spec"]["containers"][0]
    folders = {"work": tmp_path / "work", "out": tmp_path / "out"}
    for name, uri in (("shards", shards["pretrain"]), ("decoder", decoder)):
        shutil.copytree(uri, folders["work"] / name)
    folders["out"].mkdir()
    for path in (*folders.values(), *folders["work"].rglob("*")):
        path.chmod(0o777)  # the pods run as another user
    container["volumeMounts"] += [{"name": name, "mountPath": f"/{name}"} for name in folders]
    command = (
        "train",
        "tiny_pretraining",
        "data.shards=/work/shards",
        "model.decoder=/work/decoder",
        "output=/out",
        "tracking.uri=",
        "training.steps=4",
        "training.log_every=1",
        "optim.warmup_steps=1",
        "data.batch_size=8",
    )
    (job,) = render_job(Launch(command=command, name="tiny", nodes=2), pod_template, "mplug")
    played: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "mplug-config"}, "data": {"MPLUG_ROOT": "/out"}}
    ]
    for role, index in replicas(job):
        pod = pod_of(job, role, index, "tiny-master-0")
        # podman supports neither probes nor optional secrets, and publishes ports on this machine; mounted folders
        # replace the bucket of a cluster
        del pod["spec"]["containers"][0]["livenessProbe"], pod["spec"]["containers"][0]["ports"]
        pod["spec"]["containers"][0]["envFrom"] = pod["spec"]["containers"][0]["envFrom"][:1]
        pod["spec"]["volumes"] += [{"name": name, "hostPath": {"path": str(path)}} for name, path in folders.items()]
        played.append(pod)
    manifest = tmp_path / "pods.yaml"
    manifest.write_text(yaml.safe_dump_all(played))
    try:
        podman("kube", "play", "--network", network, str(manifest))
        for _ in range(120):
            states = [
                json.loads(podman("inspect", f"tiny-{name}-pytorch"))[0]["State"] for name in ("master-0", "worker-0")
            ]
            if all(state["Status"] == "exited" for state in states):
                break
            time.sleep(1)
        logs = podman("logs", "tiny-master-0-pytorch") + podman("logs", "tiny-worker-0-pytorch")
        assert [state["ExitCode"] for state in states] == [0, 0], logs
    finally:
        podman("kube", "down", str(manifest), check=False)
    (model,) = folders["out"].glob("models/tiny-pretraining/*/manifest.json")
    assert json.loads(model.read_text())["config"]["training"]["steps"] == 4
