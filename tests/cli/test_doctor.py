"""Causes every problem that the doctor detects, and checks its report."""

import copy
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cli.doctor.examine import Question, print_findings, run_checks
from cli.doctor.finding import Finding
from components.jobs.client import parse_amount
from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.paths import ROOT
from tests.helpers.pod_templates import GPU

K8S = ROOT / "k8s"


def found(question: Question, check: str) -> Finding:
    findings = [finding for finding in run_checks(question) if finding.check == check]
    assert findings, [finding.check for finding in run_checks(question)]
    return findings[0]


# ---- this machine


def test_a_laptop_passes(tmp_path: Path) -> None:
    question = Question(root=str(tmp_path / "work"), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert {finding.kind for finding in run_checks(question)} <= {"ok", "warning"}
    assert print_findings(question)
    assert list((tmp_path / "work").iterdir()) == []


def test_the_bucket_check_writes_reads_and_deletes(s3: str) -> None:
    from model import storage

    finding = found(Question(root=f"{s3}/doctor"), "storage")
    assert (finding.kind, finding.message) == ("ok", f"{s3}/doctor can be written, read and removed")
    assert list(storage.walk(f"{s3}/doctor")) == []


def test_a_missing_bucket_is_a_failure(s3: str) -> None:
    finding = found(Question(root="s3://no-such-bucket/x"), "storage")
    assert finding.kind == "failure"
    assert "no-such-bucket" in finding.message


def test_a_wrong_clock_is_a_failure(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.storage.clock_skew_s", lambda _uri: -700.0)
    finding = found(Question(root=f"{s3}/doctor"), "clock")
    assert (finding.kind, finding.message) == ("failure", "-700 s off the clock of the storage")


def test_insufficient_shared_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.doctor.examine.shutil.disk_usage", lambda _path: SimpleNamespace(total=64e6, free=1e12))
    finding = found(Question(), "/dev/shm")
    assert finding.kind == "failure"
    assert "emptyDir of medium Memory" in finding.remedy


def test_missing_gpus_are_a_failure() -> None:
    assert found(Question(gpus=8), "GPUs").message == "0 of 8"


def test_a_missing_network_interface_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    finding = found(Question(), "NCCL_SOCKET_IFNAME")
    assert (finding.kind, finding.message) == ("failure", "ib: no interface of that name")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert found(Question(), "NCCL_SOCKET_IFNAME").kind == "ok"


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_rejected_host_header_of_mlflow_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    finding = found(Question(tracking_uri=f"http://127.0.0.1:{server.server_address[1]}"), "MLflow")
    server.shutdown()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    assert finding.kind == "failure"
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" in finding.remedy


# ---- a cluster


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    """A cluster without problems."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with fake_kube(tmp_path / "kubeconfig") as server:
        server.put("podtemplates", GPU)
        server.put("configmaps", {"metadata": {"name": "mplug-config"}})
        server.put("secrets", {"metadata": {"name": "mplug-s3"}})
        data = {"initContainer.yaml": (K8S / "operator" / "initContainer.yaml").read_text()}
        server.put("configmaps", {"metadata": {"name": "training-operator-init-container"}, "data": data}, "kubeflow")
        patch = yaml.safe_load((K8S / "operator" / "mount.yaml").read_text())["spec"]
        server.put("deployments", {"metadata": {"name": "training-operator"}, "spec": patch}, "kubeflow")
        server.pages["/apis/kubeflow.org/v1"] = {"resources": [{"kind": "PyTorchJob"}]}
        restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
        server.pages["/api/v1/namespaces/mplug"] = {"metadata": {"labels": restricted}}
        node: dict[str, Any] = {"status": {"allocatable": {"nvidia.com/gpu": "8"}}}
        server.pages["/api/v1/nodes"] = {"items": [node, node]}
        yield server


CLUSTER = Question(cluster=True, namespace="mplug", nodes=2)


def test_a_complete_cluster_passes(kube: FakeKube) -> None:
    kinds = {finding.check: finding.kind for finding in run_checks(CLUSTER)}
    assert set(kinds.values()) <= {"ok", "warning"}, kinds
    assert {"API server", "rights", "training-operator", "PodTemplate", "init container", "quota"} <= set(kinds)


def test_missing_permissions_are_listed(kube: FakeKube) -> None:
    kube.denied = {("create", "pytorchjobs"), ("list", "events")}
    assert found(CLUSTER, "rights").message == "not allowed: create pytorchjobs, list events"


def test_a_cluster_without_the_operator_is_a_failure(kube: FakeKube) -> None:
    del kube.pages["/apis/kubeflow.org/v1"]
    finding = found(CLUSTER, "training-operator")
    assert (finding.kind, finding.remedy) == ("failure", "Install training-operator 1.9.")


def test_missing_components_are_listed(kube: FakeKube) -> None:
    kube.remove("configmaps", "mplug-config")
    kube.remove("podtemplates", "training")
    assert found(CLUSTER, "mplug-config").kind == "failure"
    assert found(CLUSTER, "PodTemplate").message == "namespace mplug has no PodTemplate training"


def test_a_pod_template_that_violates_a_rule_is_reported(kube: FakeKube) -> None:
    pod_template = copy.deepcopy(GPU)
    pod_template["template"]["spec"]["containers"][0]["image"] = "registry.example/training:latest"
    kube.put("podtemplates", pod_template)
    assert "other than latest" in found(CLUSTER, "PodTemplate").message


def operator_pod(kube: FakeKube) -> dict[str, Any]:
    pod: dict[str, Any] = kube.objects["kubeflow", "deployments", "training-operator"]["spec"]["template"]["spec"]
    return pod


def test_the_operators_default_init_container_is_a_failure(kube: FakeKube) -> None:
    """The ConfigMap exists but is not mounted."""
    assert found(CLUSTER, "init container").kind == "ok"
    operator_pod(kube)["volumes"] = []
    finding = found(CLUSTER, "init container")
    assert finding.kind == "failure"
    assert "nothing is mounted. A worker would be refused" in finding.message
    assert 'violates PodSecurity "restricted:latest": container init-pytorch' in finding.message
    assert not [name for _, kind, name in kube.objects if kind == "pods"]  # a dry run creates nothing
    kube.pages["/api/v1/namespaces/mplug"] = {"metadata": {"labels": {}}}
    assert found(CLUSTER, "init container").kind == "warning"  # admitted, but it waits for a DNS name


def test_a_custom_init_container_is_checked_with_the_operators_image(kube: FakeKube) -> None:
    operator_pod(kube)["containers"][0]["args"] = ["--pytorch-init-container-image=registry.example/busybox:1"]
    config = kube.objects["kubeflow", "configmaps", "training-operator-init-container"]["data"]
    config["initContainer.yaml"] = "- {name: mine, image: '{{.InitContainerImage}}', command: ['true']}"
    finding = found(CLUSTER, "init container")
    assert finding.kind == "failure"
    assert "container mine: allowPrivilegeEscalation must be false" in finding.message


def test_without_permission_to_create_pods_the_check_is_limited(kube: FakeKube) -> None:
    kube.denied = {("create", "pods")}
    finding = found(CLUSTER, "init container")
    assert (finding.kind, "Not checked with admission" in finding.message) == ("warning", True)


@pytest.mark.parametrize("template", ["a: {", "name: x", "[1]"])
def test_an_unreadable_init_container_template_is_a_failure(kube: FakeKube, template: str) -> None:
    config = kube.objects["kubeflow", "configmaps", "training-operator-init-container"]
    config["data"]["initContainer.yaml"] = template
    assert found(CLUSTER, "init container").kind == "failure"


def test_an_operator_without_read_permission_is_a_warning(kube: FakeKube) -> None:
    kube.faults.append(lambda _method, path: 403 if "deployments" in path else None)
    assert found(CLUSTER, "init container").kind == "warning"


@pytest.mark.parametrize(
    ("frameworks", "kind"), [(["batch/job"], "failure"), (["batch/job", "kubeflow.org/pytorchjob"], "ok")]
)
def test_kueue_without_the_pytorchjob_integration_is_a_failure(
    kube: FakeKube, frameworks: list[str], kind: str
) -> None:
    pod_template = copy.deepcopy(GPU)
    pod_template["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "training"}
    kube.put("podtemplates", pod_template)
    assert found(CLUSTER, "Kueue").kind == "failure"  # not installed
    settings = yaml.safe_dump({"integrations": {"frameworks": frameworks}})
    data = {"controller_manager_config.yaml": settings}
    kube.put("configmaps", {"metadata": {"name": "kueue-manager-config"}, "data": data}, "kueue-system")
    kube.put("localqueues", {"metadata": {"name": "training"}})
    assert found(CLUSTER, "Kueue").kind == kind


STOCK = "spec: {templateDefaults: {retryStrategy: {limit: 2, retryPolicy: OnError}}}"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"workflowDefaults": STOCK, "artifactRepository": "s3: {}"}, "ok", "Argo's retryPolicy is OnError"),
        ({"config": f"workflowDefaults: {{{STOCK}}}"}, "ok", "Argo's retryPolicy is OnError"),
        ({"workflowDefaults": STOCK.replace("OnError", "Always")}, "warning", "including permanent failures"),
        ({}, "ok", "is its default"),
    ],
)
def test_the_retry_policy_of_argo_is_shown(kube: FakeKube, data: dict[str, str], kind: str, message: str) -> None:
    kube.put("configmaps", {"metadata": {"name": "workflow-controller-configmap"}, "data": data}, "kubeflow")
    finding = found(CLUSTER, "pipeline steps")
    assert finding.kind == kind
    assert message in finding.message


def test_the_findings_fit_80_columns(kube: FakeKube, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    operator_pod(kube)["volumes"] = []
    assert not print_findings(CLUSTER)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("✗  init container      ") for line in lines), lines
    assert any(line.split()[:1] == ["→"] for line in lines)


def test_a_quota_without_read_permission_is_a_warning(kube: FakeKube) -> None:
    kube.faults.append(lambda _method, path: 403 if path.endswith("resourcequotas") else None)
    assert found(CLUSTER, "quota").kind == "warning"
    assert found(CLUSTER, "GPUs").kind == "ok"  # and the other checks still run


def test_a_job_above_the_quota_is_a_failure(kube: FakeKube) -> None:
    kube.put(
        "resourcequotas",
        {
            "metadata": {"name": "mplug"},
            "spec": {"hard": {"requests.nvidia.com/gpu": "16"}},
            "status": {"hard": {"requests.nvidia.com/gpu": "16"}, "used": {"requests.nvidia.com/gpu": "8"}},
        },
    )
    assert found(CLUSTER, "quota").message == "requests.nvidia.com/gpu: the job asks for 16, 8 of 16 are left"


def test_too_few_nodes_with_gpus_are_a_failure(kube: FakeKube) -> None:
    finding = [item for item in run_checks(Question(cluster=True, nodes=3)) if item.check == "GPUs"][-1]
    assert (finding.kind, finding.message) == (
        "failure",
        "there is room for 2 pods with 8 of nvidia.com/gpu each, the job has 3",
    )


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("64Gi", 64 * 2**30), ("2", 2), ("6Ti", 6 * 2**40), (3, 3)]
)
def test_kubernetes_quantities_are_parsed(text: str, number: float) -> None:
    assert parse_amount(text) == number
