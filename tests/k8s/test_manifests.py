"""Builds all manifests, validates them against schemas and rules, and checks the network policies."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from components.jobs.manifests import Launch, render_job
from tests.helpers.paths import ROOT
from tests.helpers.pod_templates import GPU

K8S = ROOT / "k8s"
Document = dict[str, Any]
pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here, which builds the overlays")


def load_validate() -> Any:
    spec = importlib.util.spec_from_file_location("validate", K8S / "validate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


validate = load_validate()


@pytest.fixture(scope="module")
def builds() -> dict[str, list[Document]]:
    return dict(validate.builds())


def test_all_manifests_are_valid() -> None:
    ended = subprocess.run([sys.executable, K8S / "validate.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) > 15


def test_an_invalid_manifest_is_reported_with_its_path(builds: dict[str, list[Document]]) -> None:
    deployment = next(item for item in builds["overlays/local"] if item["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolicie"] = "Always"
    problems = validate.check(deployment)
    assert len(problems) == len(validate.VERSIONS)
    assert all("Deployment mlflow" in problem and "imagePullPolicie" in problem for problem in problems)


@pytest.mark.parametrize("nodes", [1, 8])
def test_a_trainjob_matches_the_schema_of_trainer_2(nodes: int) -> None:
    command = ("train", "pretrain_1.3b", "data.shards=s", "model.decoder=d")
    launch = Launch(command=command, nodes=nodes, processes=8, deadline_s=3600)
    runtime, job = render_job(launch, GPU, "mplug", "trainjob")
    assert validate.check(runtime) + validate.check(job) == []
    job["spec"]["trainer"]["numProcPerNode"] = "8"
    runtime["spec"]["mlPolicy"]["torch"] = {"numProcPerNode": 8}  # accepted by Trainer 2.1
    assert validate.check(job)
    assert validate.check(runtime)


def test_committed_jobs_match_their_script(tmp_path: Path) -> None:
    mplug = str(Path(sys.executable).with_name("mplug"))
    subprocess.run([K8S / "jobs/render.sh", tmp_path], check=True, env={"PATH": "/usr/bin:/bin", "MPLUG": mplug})
    written = {path.name: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert written == {path.name: path.read_text() for path in (K8S / "jobs").glob("*.yaml")}


def test_variables_of_jobs_are_in_the_config_map(builds: dict[str, list[Document]]) -> None:
    known = next(item["data"] for item in builds["overlays/production"] if item["kind"] == "ConfigMap")
    for path in (K8S / "jobs").glob("*.yaml"):
        text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))
        assert set(re.findall(r"\$\((\w+)\)", text)) <= set(known), path


def test_manifests_contain_no_secret(builds: dict[str, list[Document]]) -> None:
    assert not [item for documents in builds.values() for item in documents if item["kind"] == "Secret"]


def test_the_namespace_enforces_the_restricted_standard(builds: dict[str, list[Document]]) -> None:
    for name, documents in builds.items():
        for item in documents:
            if item["kind"] == "Namespace":
                assert item["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted", name


def test_cluster_scoped_resources_have_no_namespace(builds: dict[str, list[Document]]) -> None:
    found = 0
    for name, documents in builds.items():
        for item in documents:
            if item["kind"] in ("ClusterQueue", "ResourceFlavor", "Queue", "Namespace"):
                assert "namespace" not in item["metadata"], (name, item["kind"])
                found += 1
    assert found >= 5


@pytest.mark.parametrize("overlay", ["local", "production"])
def test_another_namespace_is_one_setting(overlay: str) -> None:
    """The `namespace:` of an overlay's kustomization."""
    folder = Path(tempfile.mkdtemp(dir=K8S / "overlays", prefix=".build-"))
    try:
        shutil.copytree(K8S / "overlays" / overlay, folder, dirs_exist_ok=True)
        file = folder / "kustomization.yaml"
        file.write_text(file.read_text().replace("namespace: mplug ", "namespace: team-a "))
        lines = file.read_text()
        added = "  - ../../components/monitoring\n  - ../../components/kfp-standalone\n"
        known = "components:\n" in lines
        file.write_text(
            lines.replace("components:\n", f"components:\n{added}") if known else f"{lines}components:\n{added}"
        )
        documents = validate.kustomize(folder)
    finally:
        shutil.rmtree(folder)
    text = yaml.safe_dump_all(documents)
    assert not re.search(r"\bmplug\.svc|namespace[:=] ?\"?mplug\b|\.mplug:", text)
    config = next(item["data"] for item in documents if item["metadata"]["name"] == "mplug-config")
    assert config["MLFLOW_TRACKING_URI"] == "http://mlflow.team-a.svc:5000"
    assert overlay == "production" or config["AWS_ENDPOINT_URL_S3"] == "http://s3.team-a.svc:8333"
    (hosts,) = re.findall("name: MLFLOW_SERVER_ALLOWED_HOSTS\n *value: (.*)", text)
    assert "mlflow.$(NAMESPACE).svc:5000" in hosts
    assert {item["metadata"]["name"] for item in documents if item["kind"] == "Namespace"} == {"team-a"}


# ---- the network


TRAINING, MLFLOW = {"app.kubernetes.io/name": "training"}, {"app.kubernetes.io/name": "mlflow"}
POSTGRES, S3 = {"app.kubernetes.io/name": "postgres"}, {"app.kubernetes.io/name": "seaweedfs"}
BACKUP, STEP = {"app.kubernetes.io/name": "mlflow-backup"}, {"workflows.argoproj.io/workflow": "run"}
OTHER = {"app": "other"}


def selects(selector: Document, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        item["key"] in labels and (item["operator"] == "Exists" or labels[item["key"]] in item["values"])
        for item in expressions
    )


def allows(policies: list[Document], own: dict[str, str], peer: dict[str, str], port: int, way: str) -> bool:
    """Whether the policies allow egress to, or ingress from, another pod of the same namespace."""
    chosen = [item["spec"] for item in policies if selects(item["spec"]["podSelector"], own)]
    for rule in (rule for spec in chosen for rule in spec.get(way, [])):
        ports = [item["port"] for item in rule.get("ports", [])]
        peers = rule.get("to" if way == "egress" else "from", [])
        if (not ports or port in ports) and any(
            "podSelector" in item and "namespaceSelector" not in item and selects(item["podSelector"], peer)
            for item in peers
        ):
            return True
    return not any(way.capitalize() in spec["policyTypes"] for spec in chosen)


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        (TRAINING, TRAINING, 23456, True),
        (TRAINING, TRAINING, 41234, True),  # torchrun's store on a random port
        (TRAINING, S3, 8333, True),
        (TRAINING, MLFLOW, 5000, True),
        (STEP, S3, 8333, True),
        (STEP, MLFLOW, 5000, True),
        (MLFLOW, POSTGRES, 5432, True),
        (MLFLOW, S3, 8333, True),
        (BACKUP, POSTGRES, 5432, True),
        (BACKUP, S3, 8333, True),
        (TRAINING, POSTGRES, 5432, False),
        (STEP, POSTGRES, 5432, False),
        (OTHER, MLFLOW, 5000, False),
        (OTHER, S3, 8333, False),
        (OTHER, TRAINING, 23456, False),
        (MLFLOW, TRAINING, 23456, False),
        (TRAINING, S3, 9333, False),
        (POSTGRES, S3, 8333, False),
        (S3, MLFLOW, 5000, False),
        (STEP, TRAINING, 23456, False),
    ],
)
def test_network_policies_allow_exactly_the_documented_flows(
    builds: dict[str, list[Document]], source: dict[str, str], target: dict[str, str], port: int, expected: bool
) -> None:
    policies = [item for item in builds["overlays/local"] if item["kind"] == "NetworkPolicy"]
    out = allows(policies, source, target, port, "egress")
    into = allows(policies, target, source, port, "ingress")
    assert (out and into) == expected, f"out {out}, in {into}"


def test_no_pod_reaches_the_metadata_service(builds: dict[str, list[Document]]) -> None:
    for documents in builds.values():
        for item in documents:
            if item["kind"] == "NetworkPolicy":
                for rule in item["spec"].get("egress", []):
                    for peer in rule.get("to", []):
                        if "ipBlock" in peer and item["metadata"]["name"] != "dns":
                            forbidden = {"169.254.0.0/16", "fe80::/10"} & set(peer["ipBlock"]["except"])
                            assert forbidden, item["metadata"]["name"]


# ---- permissions


def test_permissions_of_the_launcher_match_its_calls(builds: dict[str, list[Document]]) -> None:
    roles = {item["metadata"]["name"]: item["rules"] for item in builds["overlays/local"] if item["kind"] == "Role"}
    may = {
        (group, resource): set(rule["verbs"])
        for rule in roles["launcher"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert may == {
        ("kubeflow.org", "pytorchjobs"): {"get", "list", "watch", "create", "patch", "delete"},
        ("kueue.x-k8s.io", "workloads"): {"list", "patch"},
        ("", "podtemplates"): {"get"},
        ("", "pods"): {"get", "list", "watch"},
        ("", "pods/log"): {"get"},
        ("", "events"): {"list"},
    }
    bound = {
        subject["name"]: item["roleRef"]["name"]
        for item in builds["overlays/local"]
        if item["kind"] == "RoleBinding"
        for subject in item["subjects"]
    }
    assert set(bound) == {"launcher"}
    assert not [item for documents in builds.values() for item in documents if item["kind"].startswith("ClusterRole")]


# ---- monitoring


def expressions() -> list[str]:
    (rules,) = yaml.safe_load_all((K8S / "components/monitoring/alerts.yaml").read_text())
    alerts = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    dashboard = json.loads((K8S / "components/monitoring/training.json").read_text())
    return alerts + [
        target["expr"].replace('"$run"', '".*"') for panel in dashboard["panels"] for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", expressions())
def test_prometheus_expressions_parse(expression: str) -> None:
    promql_parser.parse(expression)
