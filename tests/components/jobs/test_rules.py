"""A table of faults on a cluster, and the rule that rejects each before launch."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from components.jobs.manifests import Launch, Manifest, render_job
from components.jobs.pod_security import STANDARD
from components.jobs.rules import ADMISSION, SAVING_S, problems
from model.errors import ConfigError
from model.training.launch import SHUTDOWN_S
from tests.helpers.paths import FIXTURES
from tests.helpers.pod_templates import CPU

TRAIN = Launch(command=("train", "tiny_pretraining", "data.shards=s", "model.decoder=d"), name="job", nodes=2)


def job() -> Manifest:
    return render_job(TRAIN, CPU, "mplug")[-1]


def put(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        tree: Any = manifest
        for key in path[:-1]:
            tree = tree[key]
        if value is None:
            tree.pop(path[-1])
        else:
            tree[path[-1]] = value

    return change


REPLICAS = ("spec", "pytorchReplicaSpecs")
MASTER = (*REPLICAS, "Master")
POD = (*MASTER, "template", "spec")
CONTAINER = (*POD, "containers", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(*MASTER, "restartPolicy", value="OnFailure"), "restarts a wrong configuration forever"),
        (put(*MASTER, "restartPolicy", value=None), "restarts a wrong configuration forever"),
        (put(*MASTER, "restartPolicy", value="Never"), "would not survive the loss of a node"),
        (put(*CONTAINER, "args", value=["train", "x", "checkpoint.max_attempts=1000000"]), "restarts forever on OOM"),
        (put(*CONTAINER, "command", value=["torchrun"]), "restarts forever on OOM"),
        (put(*CONTAINER, "command", value=["python"]), "must start mplug or torchrun"),
        (put("spec", "runPolicy", "cleanPodPolicy", value="None"), "keeps other pods running"),
        (put("spec", "runPolicy", "cleanPodPolicy", value=None), "cleanPodPolicy must be Running"),
        (put("spec", "runPolicy", "backoffLimit", value=3), "backoffLimit must be unset"),
        (put("spec", "nprocPerNode", value="auto"), "one process per core"),
        (put("spec", "nprocPerNode", value=None), "nprocPerNode must be a number"),
        (put("metadata", "name", value="1job"), "must be a DNS-1035 label"),
        (put("metadata", "name", value="j" * 60), "has more than 63 characters"),
        (put("metadata", "name", value="j" * 64), "DNS-1035 label of at most 63 characters"),
        (put("spec", "runPolicy", "managedBy", value="someone.else"), "managedBy must be one of"),
        (put("spec", "elasticPolicy", value={"nProcPerNode": 2}), "must not both be given"),
        (put("spec", "nprocPerNode", value=2), "nprocPerNode must be a string"),
        (put(*MASTER, "replicas", value=2), "Master: replicas must be 1, got 2"),
        (put(*REPLICAS, "Worker", "replicas", value=0), "Worker: replicas must be at least 1"),
        (put(*REPLICAS, "Chief", value={"template": {"spec": {"containers": []}}}), "Chief: must be a replica type"),
        (put(*MASTER, value=None), "pods do not know the address of the first pod"),
        (put("spec", "elasticPolicy", value={"minReplicas": 1}), "elasticPolicy must be used without a Master"),
        (put(*CONTAINER, "name", value="main"), "one container must be named pytorch"),
        (put(*CONTAINER, "readinessProbe", value={"httpGet": {}}), "must have no readinessProbe"),
        (put(*CONTAINER, "startupProbe", value={"httpGet": {}}), "must have no startupProbe"),
        (put(*MASTER, "template", "metadata", "annotations", value={}), "sidecar.istio.io/inject"),
        (put(*POD, "terminationGracePeriodSeconds", value=None), "terminationGracePeriodSeconds must be more"),
        (put(*POD, "volumes", 0, value={"name": "shm", "emptyDir": {}}), "/dev/shm must be an emptyDir"),
        (put(*POD, "hostNetwork", value=True), "hostNetwork must be unset"),
        (put(*POD, "volumes", 1, value={"name": "x", "hostPath": {"path": "/"}}), "must not be hostPath"),
        (put(*POD, "securityContext", value=None), "runAsNonRoot must be true"),
        (put(*POD, "securityContext", "runAsUser", value=0), "runAsUser must not be 0"),
        (put(*POD, "securityContext", "seccompProfile", value=None), "seccompProfile.type must be"),
        (put(*CONTAINER, "securityContext", "allowPrivilegeEscalation", value=None), "allowPrivilegeEscalation"),
        (put(*CONTAINER, "securityContext", "capabilities", value={"drop": ["ALL"], "add": ["IPC_LOCK"]}), "IPC_LOCK"),
        (put(*CONTAINER, "securityContext", "readOnlyRootFilesystem", value=None), "readOnlyRootFilesystem"),
        (put(*CONTAINER, "image", value="registry.example/training"), "other than latest"),
        (put(*CONTAINER, "image", value="registry.example:5000/training:latest"), "other than latest"),
        (put(*CONTAINER, "resources", value={}), "requests must set cpu and memory"),
        (put(*CONTAINER, "env", 0, value={"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}), "must come from a secret"),
        (put(*POD, "automountServiceAccountToken", value=None), "automountServiceAccountToken must be false"),
    ],
)
def test_each_rule_rejects_its_violation(change: Callable[[Manifest], None], message: str) -> None:
    changed = copy.deepcopy(job())
    change(changed)
    assert any(message in problem for problem in problems(changed)), problems(changed)


PODS = json.loads((FIXTURES / "psa_verdicts.json").read_text())
JOBS = json.loads((FIXTURES / "pytorchjob_verdicts.json").read_text())


@pytest.mark.parametrize("verdict", PODS, ids=[verdict["name"] for verdict in PODS])
def test_pod_security_admission_and_the_rules_agree(verdict: dict[str, Any]) -> None:
    found = [problem for problem in problems(verdict["pod"]) if STANDARD in problem]
    assert bool(found) != verdict["accepted"], (found, verdict["reason"])


@pytest.mark.parametrize("verdict", JOBS, ids=[verdict["name"] for verdict in JOBS])
def test_the_operators_admission_and_the_rules_agree(verdict: dict[str, Any]) -> None:
    found = [problem for problem in problems(verdict["job"]) if ADMISSION in problem]
    assert bool(found) != verdict["accepted"], (found, verdict["reason"])


HOST = {"httpGet": {"host": "10.0.0.1", "path": "/", "port": 80}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(*CONTAINER, "lifecycle", value={"preStop": HOST}), "lifecycle.preStop.httpGet must not name a host"),
        (put(*CONTAINER, "livenessProbe", value={"tcpSocket": {"host": "x", "port": 1}}), "livenessProbe.tcpSocket"),
        (put(*CONTAINER, "securityContext", "seLinuxOptions", value={"role": "r"}), "seLinuxOptions.role"),
        (put(*CONTAINER, "securityContext", "appArmorProfile", value={"type": "Unconfined"}), "appArmorProfile.type"),
        (put(*CONTAINER, "securityContext", "windowsOptions", value={"hostProcess": True}), "hostProcess"),
        (put(*CONTAINER, "securityContext", "procMount", value="Unmasked"), "procMount must be unset"),
        (put(*POD, "ephemeralContainers", value=[{"name": "debug", "image": "x:1"}]), "container debug: allowPriv"),
    ],
)
def test_further_violations_are_rejected(change: Callable[[Manifest], None], message: str) -> None:
    changed = copy.deepcopy(job())
    change(changed)
    assert any(message in problem and STANDARD in problem for problem in problems(changed)), problems(changed)


@pytest.mark.parametrize(
    "change",
    [
        put(*REPLICAS, "Worker", value={}),
        put(*MASTER, "replicas", value="1"),
        put(*MASTER, "template", value={}),
        put(*POD, "containers", value=[{}]),
        put(*POD, "volumes", value=[{}]),
        put("spec", value={}),
        put(*CONTAINER, "env", value=[{}]),
        put(*CONTAINER, "volumeMounts", value=[{}]),
        put(*CONTAINER, "args", value=["train", "x", "checkpoint.max_attempts=many"]),
        lambda job: job["spec"]["pytorchReplicaSpecs"].update(Worker=None),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(replicas=None, template=None),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"]["template"].update(spec=None, metadata=None),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"].update(
            terminationGracePeriodSeconds=None, securityContext=None, containers=None, volumes=None
        ),
    ],
)
def test_an_incomplete_job_is_rejected_with_one_line_per_problem(change: Callable[[Any], None]) -> None:
    changed = copy.deepcopy(job())
    change(changed)
    assert all("PyTorchJob job: " in problem for problem in problems(changed))


def test_rendered_jobs_violate_no_rule() -> None:
    assert problems(job()) == []


def test_init_containers_are_checked() -> None:
    changed = job()
    changed["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["initContainers"] = [
        {"name": "init-pytorch", "image": "alpine:3.10", "command": ["sh"]}
    ]
    found = problems(changed)
    assert any("init-pytorch: capabilities.drop must hold ALL" in problem for problem in found)


def test_a_single_pod_job_needs_a_failure_policy() -> None:
    evaluation = render_job(Launch(command=("evaluate", "m", "s")), CPU, "mplug")[-1]
    assert problems(evaluation) == []
    del evaluation["spec"]["podFailurePolicy"]
    assert any("podFailurePolicy must fail the job" in problem for problem in problems(evaluation))


def test_an_invalid_pod_template_is_rejected_by_rendering() -> None:
    pod_template = copy.deepcopy(CPU)
    pod_template["template"]["spec"]["securityContext"]["runAsUser"] = 0
    with pytest.raises(ConfigError, match="runAsUser must not be 0"):
        render_job(TRAIN, pod_template, "mplug")


def test_the_grace_period_rule_matches_the_launcher() -> None:
    assert SAVING_S == SHUTDOWN_S
