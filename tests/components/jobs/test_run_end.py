"""What the exit handler of a pipeline reads from a cluster, and which jobs it stops."""

import base64
import gzip
import json
import threading
import time
from typing import Any

import pytest

from components.jobs.client import Cluster
from components.jobs.launcher import ensure_job
from components.jobs.manifests import Launch, render_job
from components.jobs.run_end import ABANDONED, NAMESPACE, RUN_LABEL, WORKFLOW, end_run
from components.jobs.workflow import Step, step_name, workflow_steps
from model.pipeline_run import RUN_ID
from tests.helpers.fake_kube import FakeKube
from tests.helpers.jobs import LAUNCH
from tests.helpers.pod_templates import CPU


@pytest.fixture(autouse=True)
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables of a step, as set by Kubernetes."""
    monkeypatch.setenv(NAMESPACE, "kubeflow")
    monkeypatch.setenv(RUN_ID, "run-1")
    monkeypatch.setenv(WORKFLOW, "pretrain-x2x4z")


def workflow(kube: FakeKube, phase: str = "Failed", **spec: Any) -> None:
    nodes = {
        "a": {"displayName": "exit-handler-1", "type": "Retry", "phase": phase},
        "b": {"displayName": "exit-handler-1(0)", "type": "DAG", "phase": "Failed"},
    }
    kube.put(
        "workflows", {"metadata": {"name": "pretrain-x2x4z"}, "spec": spec, "status": {"nodes": nodes}}, "kubeflow"
    )


def start(cluster: Cluster, name: str) -> str:
    launch = Launch(command=LAUNCH.command, name=name)
    return str(ensure_job(cluster, render_job(launch, CPU, "mplug"))["metadata"]["name"])


def test_running_jobs_of_the_run_are_stopped_and_save(
    kube: FakeKube, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("running", "finished", "given-up"):
        start(cluster, name)
    monkeypatch.setenv(RUN_ID, "run-2")
    start(cluster, "of-another-run")
    monkeypatch.setenv(RUN_ID, "run-1")
    kube.conclude("pytorchjobs", "finished", "Succeeded")
    cluster.patch("PyTorchJob", "given-up", {"metadata": {"annotations": {ABANDONED: "too slow"}}})
    workflow(kube)
    kube.pod("running-master-0", {"training.kubeflow.org/job-name": "running"})
    begun = time.monotonic()
    threading.Timer(1.5, kube.remove, ("pods", "running-master-0")).start()  # it saves a checkpoint
    assert end_run("mplug")[0] == "failed"
    assert time.monotonic() - begun > 1.4
    assert sorted(name for _, kind, name in kube.objects if kind == "pytorchjobs") == [
        "finished",
        "given-up",
        "of-another-run",
    ]


def test_a_job_adopted_by_another_run_is_kept(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_job(cluster, job)
    monkeypatch.setenv(RUN_ID, "run-2")
    ensure_job(cluster, job)
    assert kube.objects["mplug", "pytorchjobs", "job"]["metadata"]["labels"][RUN_LABEL] == "run-2"
    monkeypatch.setenv(RUN_ID, "run-1")
    end_run("mplug")
    assert ("mplug", "pytorchjobs", "job") in kube.objects


def test_the_exit_handler_reports_why_each_step_failed(kube: FakeKube) -> None:
    workflow(kube)
    nodes = kube.objects["kubeflow", "workflows", "pretrain-x2x4z"]["status"]["nodes"]
    message = "Error (exit code 1): exit code 1: top1 must be at least 0.75, got 0.5."
    nodes["c"] = {"name": "wf.root(0).gate(0).executor(0)", "type": "Pod", "phase": "Failed", "message": message}
    assert end_run("mplug") == ("failed", ["gate: top1 must be at least 0.75, got 0.5."])


@pytest.mark.parametrize("spec", [{"activeDeadlineSeconds": 0}, {"shutdown": "Terminate"}])
def test_cancelled_and_failed_runs_are_distinguished(kube: FakeKube, spec: dict[str, Any]) -> None:
    workflow(kube, **spec)
    assert end_run("mplug")[0] == "cancelled"


def test_a_run_that_succeeded_after_a_retry_is_successful(kube: FakeKube) -> None:
    workflow(kube, "Succeeded", activeDeadlineSeconds=3600)
    assert end_run("mplug")[0] == "succeeded"


def test_without_permission_to_read_the_workflow_stages_decide(
    kube: FakeKube, caplog: pytest.LogCaptureFixture
) -> None:
    kube.faults.append(lambda _method, path: 403 if "workflows" in path else None)
    assert end_run("mplug") == (None, [])
    assert "the outcome is taken from the stages" in caplog.text


@pytest.mark.parametrize("code", [403, 404])
def test_a_cluster_without_pytorchjobs_still_ends_the_run(kube: FakeKube, code: int) -> None:
    workflow(kube, activeDeadlineSeconds=0)
    kube.faults.append(lambda _method, path: code if "pytorchjobs" in path else None)
    assert end_run("mplug")[0] == "cancelled"


def test_compressed_nodes_of_large_workflows_are_read() -> None:
    nodes = {"a": {"name": "wf.root(0).train(0).executor(0)", "type": "Pod", "phase": "Failed", "message": "gone"}}
    packed = base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()
    (step,) = workflow_steps({"metadata": {"name": "wf"}, "status": {"compressedNodes": packed}})
    assert (step.name, step.code, step.reason) == ("train", 144, "gone")


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        ("Error (exit code 1): exit code 2: a must be 1.", 2, "a must be 1."),
        ("Error (exit code 143)", 143, "Error (exit code 143)"),
        ("OOMKilled (exit code 137)", 4, "OOM-killed at the limit of its pod"),
        ("pod deleted", 144, "pod deleted"),
        ("", 144, "no reason is known."),
    ],
)
def test_a_step_has_the_exit_code_of_its_command(message: str, code: int, reason: str) -> None:
    step = Step("train", "Failed", message, "node")
    assert step.code == code
    assert step.reason.startswith(reason)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("run-x2.root(0).tasks(0).iteration(1:1)(0).train(0).executor(0)", "train"),
        ("run-x2.root.shard-2-driver", "shard-2"),
        ("run-x2.root(0).download shares(0).iteration(0:1/8.x)(0).download(0).executor(1)", "download"),
        ("run-x2.root(0)", "root"),
        ("", ""),
    ],
)
def test_argo_nodes_map_to_step_names(node: str, name: str) -> None:
    assert step_name(node) == name


def test_outside_kubeflow_pipelines_no_workflow_is_read(kube: FakeKube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_ID)
    assert end_run("mplug") == (None, [])
    assert kube.requests == []
