"""Compiled pipelines on a double of Kubeflow Pipelines, with real steps, real S3 and MLflow, and one small node."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

from components.jobs.run_end import RUN_LABEL
from model.config.load import load_config
from model.config.schema import count_in_steps
from model.data.shards.reader import read_dataset_info
from model.tracking import tracked
from model.training import attempts
from tests.helpers.fake_kfp import FakeKfp, fake_kfp
from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.kfp_backend import NAMESPACE, Backend
from tests.helpers.paths import MPLUG, ROOT
from tests.helpers.pod_templates import CPU

LOCAL = list(yaml.safe_load_all((ROOT / "k8s/overlays/local/training.yaml").read_text()))[1]["data"]
"""Step sizes for a machine with 2 cores, of which Kubernetes and Kubeflow leave half a core."""
SHORT = "[training.steps=2,optim.warmup_steps=1,data.batch_size=8,data.workers=0]"


@dataclass(frozen=True)
class Cluster:
    kube: FakeKube
    kfp: FakeKfp
    backend: Backend
    mlflow: mlflow.MlflowClient
    items: list[str]

    def start(self, *items: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        return self.command("submit", "pretrain", *self.items, *items, *options)

    def command(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [MPLUG, "pipeline", *arguments, "--host", self.kfp.url]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def job(self, seconds: float = 90) -> dict[str, Any]:
        (job,) = self.kube.wait_for("pytorchjobs", seconds=seconds)
        return job

    def states(self) -> list[str]:
        """States of the pipeline's runs in MLflow, oldest first."""
        experiment = self.mlflow.get_experiment_by_name("mplug-video")
        assert experiment
        found = self.mlflow.search_runs(
            [experiment.experiment_id], "tags.`mplug.pipeline` = 'pretrain'", order_by=["attributes.start_time ASC"]
        )
        return [run.info.status for run in found]


@pytest.fixture(scope="module")
def cluster(s3: str, corpus: Path, decoder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("backend")
    before = dict(os.environ)
    os.environ["KUBECONFIG"] = str(folder / "kubeconfig")
    uri = f"sqlite:///{folder}/mlflow.db"
    with fake_kube(folder / "kubeconfig") as kube, fake_kfp(Backend(kube, folder, cores=0.5)) as kfp:
        kube.put("podtemplates", CPU)
        sizes = {key: value for key, value in LOCAL.items() if key != "nodes"} | {"shard_cpu": "1"}
        addresses = {"MPLUG_ROOT": f"{s3}/backend", "MLFLOW_TRACKING_URI": uri}
        kube.put("configmaps", {"metadata": {"name": "mplug-config"}, "data": addresses})
        kube.put("configmaps", {"metadata": {"name": "mplug-pipelines"}, "data": sizes})
        items = [
            f"source={corpus}",
            "source_version=1",
            f"decoder={decoder}",
            "config=tiny_pretraining",
            "num_frames=8",
            "short_side=72",
            f"overrides={SHORT}",
            "nodes=2",
        ]
        assert kfp.backend
        yield Cluster(kube, kfp, kfp.backend, mlflow.MlflowClient(uri), items)
    os.environ.clear()
    os.environ.update(before)


def publish(cluster: Cluster) -> None:
    """Acts as the operator and the pods of the job."""
    job = cluster.job()
    arguments = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["args"]
    config = load_config(arguments[1], arguments[2:])
    config = count_in_steps(config, read_dataset_info(config.data.shards)["clips"]["train"])
    with tracked(config.tracking, config.name) as run:
        run.params({"seed": config.seed})
    attempts.finish_attempt(attempts.run_folder(config), attempts.Attempt(key="k", model="s3://the/model"))
    cluster.kube.conclude("pytorchjobs", job["metadata"]["name"], "Succeeded")


def running_pod(cluster: Cluster, step: str) -> str:
    """The pod of a step, as soon as its command runs."""
    for _ in range(600):
        for (_, kind, name), pod in list(cluster.kube.objects.items()):
            node = pod["metadata"].get("annotations", {}).get("workflows.argoproj.io/node-name", "")
            if kind == "pods" and f".{step}(0)" in node and name in cluster.backend.processes:
                return name
        time.sleep(0.1)
    raise AssertionError(f"no pod of {step}")


def test_a_pending_step_is_shown_and_cancelling_cleans_up(cluster: Cluster) -> None:
    submitted = cluster.start(options=("--wait",))
    lines = []
    assert submitted.stdout
    for line in submitted.stdout:
        lines.append(line)
        if "shard waits" in line:
            cluster.backend.terminate("r0")
    assert submitted.wait() == 1
    text = "".join(lines)
    assert "running: start-run" in text
    assert "shard waits: Unschedulable: 0/1 nodes are available: 1 Insufficient cpu." in text
    assert re.search(r"^error: run r0 was cancelled\. http", text, re.MULTILINE)
    assert cluster.backend.runs["r0"].state == "FAILED"  # the state in Kubeflow
    assert cluster.states() == ["KILLED"]


def test_a_drained_step_is_retried_and_mlflow_follows(cluster: Cluster) -> None:
    submitted = cluster.start("shard_cpu=100m", options=("--wait", "--retries", "1"))
    first = cluster.job()
    assert first["metadata"]["labels"][RUN_LABEL] == "r1"
    cluster.backend.drain(running_pod(cluster, "train"))
    for _ in range(300):  # the exit handler has run
        if cluster.backend.runs["r1"].state == "FAILED" or cluster.states()[-1] == "FAILED":
            break
        time.sleep(0.1)
    assert cluster.states()[-1] == "FAILED"
    again = cluster.job()
    assert again["metadata"]["uid"] != first["metadata"]["uid"]  # the exit handler stopped it with a checkpoint
    publish(cluster)
    text, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 0, text
    assert "train: Error (exit code 143)" in text
    assert "retrying failed steps, 0 retries left" in text
    assert "run r1 has succeeded" in text
    assert cluster.states() == ["KILLED", "FINISHED"]


def test_cancelling_a_retried_run_leaves_no_job(cluster: Cluster) -> None:
    """The exit handler has already run and is not repeated."""
    cluster.kube.remove("pytorchjobs", cluster.job()["metadata"]["name"])
    submitted = cluster.start("shard_cpu=100m", "run_name=other", options=("--wait",))
    cluster.job()
    cluster.backend.drain(running_pod(cluster, "train"))
    assert submitted.wait(60) == 143
    assert cluster.command("retry", "r2").wait(60) == 0
    cluster.job()
    ended = cluster.command("cancel", "r2")
    text, _ = ended.communicate(timeout=60)
    assert (ended.returncode, text.splitlines()[-1]) == (0, "r2 was cancelled"), text
    assert not [name for _, kind, name in cluster.kube.objects if kind == "pytorchjobs"]


def test_a_permanent_failure_is_one_line_and_not_retried(cluster: Cluster) -> None:
    options = ("--retries", "3")
    submitted = cluster.start("shard_cpu=100m", "dataset=other", "source=/no/such/folder", options=options)
    text, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 3, text
    assert re.search(r"^error: download: .*/no/such/folder", text, re.MULTILINE)
    assert "run again" not in text
    assert "the end of the log of download:" in text
    assert "Traceback" not in text
    assert not re.search(r"executor|iteration|driver", text)


def test_an_unknown_input_ends_the_run(cluster: Cluster) -> None:
    """The driver of Kubeflow Pipelines does the same, so compiled files are checked."""
    from pipelines.catalog import compiled_documents, with_defaults

    spec, platform = compiled_documents("pretrain")
    loop = spec["components"]["comp-for-loop-1"]
    del loop["inputDefinitions"]["parameters"]["pipelinechannel--download_cpu"]
    given = {"source": "s", "decoder": "d", "image": "i", "cpu_image": "i", "code_version": "1", "run_name": "none"}
    values = {**with_defaults("pretrain", given), "tracking_uri": "", "root": "/none"}
    cluster.backend.start("r9", spec, platform, values)
    while cluster.backend.runs["r9"].state in ("PENDING", "RUNNING"):
        time.sleep(0.1)
    nodes = cluster.kube.find(NAMESPACE, "workflows", "wf-r9")["status"]["nodes"].values()
    assert any("parent DAG does not have input parameter" in node["message"] for node in nodes)


def test_a_benchmark_is_gated_registered_and_trained_once(cluster: Cluster, pretrained: str) -> None:
    """Uses the sizes of the local overlay. The gate fails and is not retried."""
    items = ["configs=[tiny_classification]", f"raw={cluster.items[0].removeprefix('source=')}", "raw_version=1"]
    items += [
        f"pretrained={pretrained}",
        f"overrides={SHORT}",
        "num_frames=8",
        "short_side=72",
        "nodes=0",
        "processes=1",
    ]
    command = ["submit", "benchmark", *items, "shard_cpu=100m", "--retries", "2"]
    refused = cluster.command(*command, "minimum={classification: 1.01}")
    text, _ = refused.communicate(timeout=200)
    assert refused.returncode == 1, text
    assert re.search(r"^error: gate: classification: top1 must be at least 1.0100, got ", text, re.MULTILINE), text
    assert "run again" not in text
    assert "Traceback" not in text
    refused_run = list(cluster.backend.runs.values())[-1]
    (summary,) = [out["Output"] for path, out in refused_run.done.items() if path.endswith("finish-run")]
    assert summary.splitlines()[1].startswith("gate: classification: top1 must be at least 1.0100")
    accepted = cluster.command(*command, "minimum={classification: 0.0}")
    text, _ = accepted.communicate(timeout=200)
    assert accepted.returncode == 0, text
    assert "running: train" not in text  # cached
    version = cluster.mlflow.get_model_version_by_alias("mplug-video-classification", "candidate")
    assert version.source.startswith("s3://")
