"""A table of what goes wrong on a cluster, and the rule that says so before."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from shapes import CPU

from components.manifests import Launch, Manifest, render
from components.rules import SAVING_S, problems
from components.torchrun import SHUTDOWN_S
from model.config import ConfigError

TRAIN = Launch(command=("train", "tiny_pretraining", "data.shards=s", "model.decoder=d"), name="job", nodes=2)


def job() -> Manifest:
    return render(TRAIN, CPU, "mplug")[-1]


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
    ("change", "said"),
    [
        (put(*MASTER, "restartPolicy", value="OnFailure"), "restarts a wrong configuration forever"),
        (put(*MASTER, "restartPolicy", value=None), "restarts a wrong configuration forever"),
        (put(*MASTER, "restartPolicy", value="Never"), "would not survive the loss of a node"),
        (put(*CONTAINER, "args", value=["train", "x", "checkpoint.max_attempts=1000000"]), "restarts forever on OOM"),
        (put(*CONTAINER, "command", value=["torchrun"]), "restarts forever on OOM"),
        (put(*CONTAINER, "command", value=["python"]), "must start mplug or torchrun"),
        (put("spec", "runPolicy", "cleanPodPolicy", value="None"), "leaves the others running"),
        (put("spec", "runPolicy", "cleanPodPolicy", value=None), "cleanPodPolicy must be Running"),
        (put("spec", "runPolicy", "backoffLimit", value=3), "backoffLimit must be unset"),
        (put("spec", "nprocPerNode", value="auto"), "one process per core"),
        (put("spec", "nprocPerNode", value=None), "nprocPerNode must be a number"),
        (put("metadata", "name", value="1job"), "must be a DNS-1035 label"),
        (put("metadata", "name", value="j" * 60), "has more than 63 characters"),
        (put(*MASTER, "replicas", value=2), "Master must have 1 replica"),
        (put(*REPLICAS, "Worker", "replicas", value=0), "Worker must have 1 replica"),
        (put(*REPLICAS, "Chief", value={"template": {"spec": {"containers": []}}}), "Chief is no replica type"),
        (put(*MASTER, value=None), "no pod is told where the first one is"),
        (put("spec", "elasticPolicy", value={"minReplicas": 1}), "elasticPolicy must go without a Master"),
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
        (put(*CONTAINER, "resources", value={}), "requests must name cpu and memory"),
        (put(*CONTAINER, "env", 0, value={"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}), "must come from a secret"),
        (put(*POD, "automountServiceAccountToken", value=None), "automountServiceAccountToken must be false"),
    ],
)  # fmt: skip
def test_a_job_that_would_go_wrong_is_told_apart(change: Callable[[Manifest], None], said: str) -> None:
    changed = copy.deepcopy(job())
    change(changed)
    assert any(said in problem for problem in problems(changed)), problems(changed)


def test_a_job_as_it_is_rendered_has_no_problems() -> None:
    assert problems(job()) == []


def test_an_init_container_is_held_to_the_standard_too() -> None:
    changed = job()
    changed["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["initContainers"] = [
        {"name": "init-pytorch", "image": "alpine:3.10", "command": ["sh"]}
    ]
    found = problems(changed)
    assert any("init-pytorch: capabilities.drop must hold ALL" in problem for problem in found)


def test_a_job_of_one_pod_must_know_what_is_permanent() -> None:
    evaluation = render(Launch(command=("evaluate", "m", "s")), CPU, "mplug")[-1]
    assert problems(evaluation) == []
    del evaluation["spec"]["podFailurePolicy"]
    assert any("podFailurePolicy must end the job" in problem for problem in problems(evaluation))


def test_a_wrong_shape_is_refused_where_the_job_is_rendered() -> None:
    shape = copy.deepcopy(CPU)
    shape["template"]["spec"]["securityContext"]["runAsUser"] = 0
    with pytest.raises(ConfigError, match="runAsUser must not be 0"):
        render(TRAIN, shape, "mplug")


def test_the_rule_on_saving_speaks_of_what_the_launcher_grants() -> None:
    assert SAVING_S == SHUTDOWN_S
