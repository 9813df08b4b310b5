"""End to end on a real cluster: install, check, train on two nodes, lose a pod, resume, and read the results in MLflow.

`make e2e-cluster` runs it on the cluster of the current context, or on one that it starts on this machine. It installs
overlays/local into the namespace mplug, and keeps it there on a cluster that it has not started.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
import pytest
import yaml

from cli.services import free_ports
from tests.e2e import machine
from tests.e2e.machine import kubectl
from tests.helpers.paths import MPLUG, ROOT

STEPS = 60
SETTINGS = [f"training.steps={STEPS}", "training.log_every=1", "optim.warmup_steps=1", "data.batch_size=8"]


def is_reachable() -> bool:
    command = ["kubectl", "version", "--request-timeout=5s"]
    return bool(shutil.which("kubectl")) and subprocess.run(command, capture_output=True).returncode == 0


REASON = "" if is_reachable() else machine.missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def minor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Minor version of the cluster, which exists during the tests."""
    if is_reachable():
        yield server_minor()
        return
    with machine.cluster(tmp_path_factory.mktemp("cluster")):
        yield server_minor()


def server_minor() -> int:
    return int("".join(filter(str.isdigit, json.loads(kubectl("version", "-o", "json"))["serverVersion"]["minor"])))


@pytest.fixture(scope="module")
def installed(minor: int) -> str:
    """Namespace of overlays/local, with all pods ready."""
    documents = list(yaml.safe_load_all(kubectl("kustomize", str(ROOT / "k8s" / "overlays" / "local"))))
    for document in documents:
        if document["kind"] == "CronJob" and minor < 21:
            document["apiVersion"] = "batch/v1beta1"
    namespace = [document for document in documents if document["kind"] == "Namespace"]
    unchecked = ["--validate=false"] if minor < 25 else []
    kubectl("apply", *unchecked, "-f", "-", stdin=yaml.safe_dump_all(namespace))
    subprocess.run([ROOT / "k8s" / "secrets.sh", "mplug"], check=True)
    kubectl("apply", *unchecked, "-f", "-", stdin=yaml.safe_dump_all(documents))
    for workload in ("statefulset/seaweedfs", "statefulset/postgres", "deployment/mlflow"):
        kubectl("--namespace", "mplug", "rollout", "status", workload, "--timeout=300s")
    return "mplug"


@contextmanager
def forwarded(namespace: str, service: str, port: int) -> Iterator[str]:
    """Local address of a service."""
    here = free_ports(1)
    command = ["kubectl", "--namespace", namespace, "port-forward", f"service/{service}", f"{here}:{port}"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert child.stdout
        assert "Forwarding" in (line := child.stdout.readline()), line
        yield f"http://127.0.0.1:{here}"
    finally:
        child.terminate()
        child.wait()


@pytest.fixture(scope="module")
def bucket(installed: str) -> Iterator[dict[str, str]]:
    """Environment variables to access the cluster's S3 from this machine."""
    secret = json.loads(kubectl("--namespace", installed, "get", "secret", "mplug-s3", "-o", "json"))["data"]
    keys = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    with forwarded(installed, "s3", 8333) as address:
        yield {**os.environ, **keys, "AWS_ENDPOINT_URL_S3": address, "AWS_DEFAULT_REGION": "us-east-1"}


def mplug(environment: dict[str, str], *arguments: str) -> str:
    ended = subprocess.run([MPLUG, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert ended.returncode == 0, f"mplug {' '.join(arguments)}: {ended.stdout[-3000:]}{ended.stderr[-3000:]}"
    return ended.stdout.strip()


@pytest.fixture(scope="module")
def data(bucket: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a training run with shards and decoder in the cluster's bucket."""
    corpus, root = str(tmp_path_factory.mktemp("e2e") / "corpus"), "s3://mplug/work"
    mplug(bucket, "data", "synthesize", corpus, "--scale", "0.03")
    raw = mplug(bucket, "data", "download", corpus, root)
    shards = mplug(bucket, "data", "shard", raw, root, "--short-side", "72", "--num-frames", "8")
    tokenizer = mplug(bucket, "data", "tokenizer", raw, root)
    settings = [f"data.shards={shards}", f"model.decoder={tokenizer}", f"output={root}", "training.steps=2"]
    decoder = mplug(bucket, "train", "tiny_decoder", *settings, "optim.warmup_steps=1", "data.batch_size=8")
    return [f"data.shards={shards}", f"model.decoder={decoder}"]


def test_permissions_are_minimal(installed: str) -> None:
    def may(account: str, *asked: str) -> bool:
        who = f"--as=system:serviceaccount:{installed}:{account}"
        return kubectl("auth", "can-i", *asked, "--namespace", installed, who, check=False).strip() == "yes"

    assert all(may("launcher", verb, "pytorchjobs.kubeflow.org") for verb in ("create", "get", "watch", "delete"))
    assert may("launcher", "get", "podtemplates/training")
    assert may("launcher", "get", "pods", "--subresource=log")
    for asked in (("create", "pods"), ("delete", "pods"), ("get", "secrets/mplug-s3"), ("list", "secrets")):
        assert not may("launcher", *asked), asked
    for account in ("training", "tracking"):
        for asked in (("list", "pods"), ("get", "secrets/mplug-s3"), ("create", "pytorchjobs.kubeflow.org")):
            assert not may(account, *asked), (account, asked)


def test_the_jobs_are_accepted_by_the_api_server(installed: str, minor: int) -> None:
    unchecked = ["--validate=false"] if minor < 25 else []
    output = kubectl("apply", *unchecked, "--dry-run=server", "-f", str(ROOT / "k8s" / "jobs"))
    assert output.count("created (server dry run)") == len(list((ROOT / "k8s" / "jobs").glob("*.yaml")))


def test_the_doctor_passes_inside_a_pod(installed: str) -> None:
    output = mplug(dict(os.environ), "doctor", "--cluster", "--pod", "--namespace", installed)
    assert "✗" not in output
    assert "s3://mplug/work can be written, read and removed" in output
    assert "http://mlflow.mplug.svc:5000 takes runs" in output


def test_two_nodes_train_lose_a_pod_and_resume(installed: str, data: list[str], bucket: dict[str, str]) -> None:
    environment = dict(os.environ)
    options = ["--namespace", installed, "--nodes", "2"]
    name = mplug(
        environment, "job", "apply", *options, "train", "tiny_pretraining", *data, *SETTINGS, "checkpoint.every=10"
    )
    watching = subprocess.Popen(
        [MPLUG, "job", "watch", name, "--namespace", installed],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    checkpoints = wait_for_checkpoint(bucket)
    kubectl("--namespace", installed, "delete", "pod", f"{name}-worker-0")
    out, err = watching.communicate(timeout=600)
    assert watching.returncode == 0, out[-3000:] + err[-3000:]
    assert re.search(f"pod {name}-worker-0 was replaced: .* Training resumes from step ", err), err
    assert checkpoints
    manifest = mplug_manifest(bucket)
    assert manifest["config"]["training"]["steps"] == STEPS
    with forwarded(installed, "mlflow", 5000) as address:
        steps = [point.step for point in history(address, "tiny-pretraining", "train/loss")]
    assert steps == list(range(1, STEPS + 1))


def wait_for_checkpoint(bucket: dict[str, str]) -> list[str]:
    """Waits for the first checkpoint and lists the checkpoints in the bucket."""
    code = "from model import storage; print(*[e.path for e in storage.walk('s3://mplug/work/checkpoints')], sep='\\n')"
    for _ in range(120):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bucket)
        found = [path for path in ended.stdout.splitlines() if "tiny_pretraining" in path or "tiny-pretraining" in path]
        if any(path.endswith("manifest.json") for path in found):
            return found
        time.sleep(1)
    raise AssertionError(f"no checkpoint within two minutes: {ended.stdout}{ended.stderr}")


def mplug_manifest(bucket: dict[str, str]) -> dict[str, Any]:
    code = (
        "import json; from model import manifest; base = 's3://mplug/work/models/tiny-pretraining';"
        "print(json.dumps(manifest.read(manifest.latest(base))))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bucket)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def history(address: str, run: str, metric: str) -> list[Any]:
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{run}'")
    assert found.info.status == "FINISHED"
    return client.get_metric_history(found.info.run_id, metric)


def test_the_backup_reaches_the_bucket(installed: str, bucket: dict[str, str], minor: int) -> None:
    documents = yaml.safe_load_all(kubectl("kustomize", str(ROOT / "k8s" / "overlays" / "local")))
    cron = next(document for document in documents if document["kind"] == "CronJob")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "backup-now", "namespace": installed},
        "spec": cron["spec"]["jobTemplate"]["spec"],
    }
    unchecked = ["--validate=false"] if minor < 25 else []
    kubectl("apply", *unchecked, "-f", "-", stdin=yaml.safe_dump(job))
    kubectl("--namespace", installed, "wait", "--for=condition=complete", "job/backup-now", "--timeout=180s")
    code = "from model import storage; print(*[e.size for e in storage.walk('s3://mplug/work/backups')])"
    sizes = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bucket).stdout.split()
    assert len(sizes) == 1
    assert int(sizes[0]) > 10_000


@pytest.fixture(scope="module")
def pipelines(installed: str) -> Iterator[str]:
    """URL of the cluster's Kubeflow Pipelines, whose steps may start jobs in the namespace."""
    if "ml-pipeline" not in kubectl("--namespace", "kubeflow", "get", "services", check=False):
        pytest.skip("the cluster has no Kubeflow Pipelines")
    access = (ROOT / "k8s" / "components" / "kfp-standalone" / "access.yaml").read_text()
    kubectl("--namespace", installed, "apply", "-f", "-", stdin=access)
    subprocess.run([ROOT / "k8s" / "secrets.sh", "--copy-to", "kubeflow", installed], check=True)
    with forwarded("kubeflow", "ml-pipeline", 8888) as address:
        yield address


def test_the_benchmark_pipeline_runs_with_defaults_of_the_overlay(
    pipelines: str, data: list[str], bucket: dict[str, str]
) -> None:
    root, steps = "s3://mplug/work", "overrides=[training.steps=2,optim.warmup_steps=1,data.batch_size=8]"
    settings = [*data, *SETTINGS, f"output={root}", "name=e2e-pretrained", "training.steps=2"]
    pretrained = mplug(bucket, "train", "tiny_pretraining", *settings)
    configs = "configs=[tiny_classification,tiny_retrieval,tiny_captioning]"
    items = [f"raw={root}/raw/corpus", f"pretrained={pretrained}", "num_frames=8", "short_side=72", configs, steps]
    command = [MPLUG, "pipeline", "submit", "benchmark", *items, "--host", pipelines, "--wait", "--retries", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "running: evaluate" in ended.stderr


def test_a_cancelled_pipeline_leaves_no_job(pipelines: str, data: list[str], bucket: dict[str, str]) -> None:
    decoder = next(item for item in data if item.startswith("model.decoder=")).partition("=")[2]
    items = ["source=s3://mplug/work/raw/corpus", "source_version=1", f"decoder={decoder}", "config=tiny_pretraining"]
    items += [
        "num_frames=8",
        "short_side=72",
        "overrides=[training.steps=5000,data.batch_size=8]",
        "run_name=cancelled",
    ]
    link = mplug(dict(os.environ), "pipeline", "submit", "pretrain", *items, "--host", pipelines)
    run_id = link.rpartition("/")[2]
    for _ in range(600):
        if kubectl("--namespace", "mplug", "get", "pytorchjobs", "-l", f"mplug-video/run={run_id}", "-o", "name"):
            break
        time.sleep(1)
    request = urllib.request.Request(f"{pipelines}/apis/v2beta1/runs/{run_id}:terminate", data=b"{}", method="POST")
    urllib.request.urlopen(request).read()
    for _ in range(300):
        if not kubectl("--namespace", "mplug", "get", "pytorchjobs", "-l", f"mplug-video/run={run_id}", "-o", "name"):
            return
        time.sleep(1)
    raise AssertionError("the job of the cancelled run is still there")
