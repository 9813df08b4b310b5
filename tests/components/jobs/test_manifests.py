import copy
from typing import Any

import pytest
import yaml

from components.jobs.manifests import LONGEST_NAME, Launch, render_job
from components.jobs.rules import problems
from model.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.pod_templates import CPU, GPU

TRAIN = ("train", "tiny_pretraining", "data.shards=s", "model.decoder=d")


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    if manifest["kind"] == "Job":
        return manifest["spec"]["template"]
    return manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]


def test_a_training_job_has_a_master_and_its_workers() -> None:
    (job,) = render_job(Launch(command=TRAIN, nodes=8), GPU, "mplug")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 7)
    assert job["spec"]["nprocPerNode"] == "8"
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    assert set(render_job(Launch(command=TRAIN), GPU, "mplug")[0]["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def test_a_defaulted_restart_policy_of_the_template_is_ignored() -> None:
    """training-operator emits a warning for each job whose pods set one."""
    pod_template = copy.deepcopy(CPU)
    pod_template["template"]["spec"]["restartPolicy"] = "Always"
    assert "restartPolicy" not in pod_of(render_job(Launch(command=TRAIN), pod_template, "mplug")[0])["spec"]
    assert (
        pod_of(render_job(Launch(command=("evaluate", "m", "s")), pod_template, "mplug")[0])["spec"]["restartPolicy"]
        == "Never"
    )


def test_a_training_pod_runs_the_command_with_cluster_addresses() -> None:
    (job,) = render_job(Launch(command=(*TRAIN, "output=s3://mine/work")), CPU, "mplug")
    container = pod_of(job)["spec"]["containers"][0]
    assert container["command"] == ["mplug"]
    assert container["args"] == [*TRAIN, "output=s3://mine/work", "tracking.uri=$(MLFLOW_TRACKING_URI)"]
    assert job["spec"]["nprocPerNode"] == "1"


@pytest.mark.parametrize(
    ("launch", "cpu", "memory", "gpus"),
    [
        (Launch(command=TRAIN), "96", "500Gi", "8"),
        (Launch(command=TRAIN, processes=2), "24", "125Gi", "2"),
        (Launch(command=("evaluate", "m", "s")), "12", "63Gi", "1"),
        (Launch(command=("data", "shard", "raw", "root")), "12", "63Gi", None),
    ],
)
def test_resources_are_proportional_to_the_gpus_of_a_job(
    launch: Launch, cpu: str, memory: str, gpus: str | None
) -> None:
    resources = pod_of(render_job(launch, GPU, "mplug")[0])["spec"]["containers"][0]["resources"]
    assert resources["requests"] == {"cpu": cpu, "memory": memory}
    assert resources["limits"].get("nvidia.com/gpu") == gpus


def test_more_gpus_than_a_node_has_are_rejected() -> None:
    with pytest.raises(ConfigError, match="at most the GPUs of the PodTemplate, 8 per node, got 16"):
        render_job(Launch(command=TRAIN, processes=16), GPU, "mplug")


def test_a_single_pod_job_has_no_liveness_probe() -> None:
    container = pod_of(render_job(Launch(command=("evaluate", "m", "s")), CPU, "mplug")[0])["spec"]["containers"][0]
    assert "livenessProbe" not in container
    assert pod_of(render_job(Launch(command=TRAIN), CPU, "mplug")[0])["spec"]["containers"][0]["livenessProbe"]


def test_only_download_jobs_have_internet_access() -> None:
    policy = yaml.safe_load((ROOT / "k8s/base/network-policies/web.yaml").read_text(encoding="utf-8"))
    (label,) = policy["spec"]["podSelector"]["matchLabels"]
    for command, expected in (
        (("data", "download", "x", "y"), "true"),
        (("data", "shard", "x", "y"), None),
        (TRAIN, None),
    ):
        pod = pod_of(render_job(Launch(command=command), CPU, "mplug")[0])
        assert pod["metadata"]["labels"].get(label) == expected


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train",), "must be given a preset"),
        (("train", "tiny_pretrainin", "data.shards=s"), "did you mean tiny_pretraining"),
        ((*TRAIN, "optim.lrr=1"), "optim.lrr is not a known key"),
        ((*TRAIN, "data.batch_size=7"), "multiple of processes"),
    ],
)
def test_invalid_training_settings_are_rejected_before_launch(command: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_job(Launch(command=command, nodes=2), CPU, "mplug")


@pytest.mark.parametrize("name", ["Job", "1job", "job_1", "job-", "j" * (LONGEST_NAME + 1)])
def test_invalid_job_names_are_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="the name of a job must be"):
        render_job(Launch(command=TRAIN, name=name), CPU, "mplug")


def test_queues_come_from_the_pod_template() -> None:
    pod_template = copy.deepcopy(CPU)
    pod_template["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "training"}
    pod_template["metadata"]["annotations"] = {"scheduling.volcano.sh/queue-name": "mplug"}
    (job,) = render_job(Launch(command=TRAIN), pod_template, "mplug")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert job["spec"]["runPolicy"]["schedulingPolicy"] == {"queue": "mplug"}


@pytest.mark.parametrize(("nodes", "longest"), [(1, 48), (10, 48), (11, 47), (1000, 46)])
def test_trainjob_names_leave_room_for_pod_suffixes(nodes: int, longest: int) -> None:
    launch = {"command": (*TRAIN, f"data.batch_size={nodes}"), "nodes": nodes}
    assert render_job(Launch(name="j" * longest, **launch), CPU, "mplug", "trainjob")
    with pytest.raises(ConfigError, match=f"at most {longest} of them"):
        render_job(Launch(name="j" * (longest + 1), **launch), CPU, "mplug", "trainjob")
    job = render_job(Launch(name="j", **launch), CPU, "mplug", "trainjob")[-1]
    job["metadata"]["name"] = "j" * (longest + 1)
    assert f"at most {longest} characters for JobSet" in problems(job)[0]


def test_a_trainjob_has_its_own_runtime() -> None:
    runtime, job = render_job(Launch(command=TRAIN, nodes=4, deadline_s=3600), GPU, "mplug", "trainjob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"] == {"numNodes": 4, "numProcPerNode": 8}
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["containers"]] == ["node"]
    assert pod["restartPolicy"] == "Never"
