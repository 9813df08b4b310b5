"""Renders the manifests of jobs: PyTorchJobs, TrainJobs, and Jobs for single pods. Knows no kfp.

The pod is the PodTemplate `training`, which the overlays of k8s/ install. PyTorchJobs are built from the models of
kubeflow-training, Jobs and TrainJobs from the YAML files in this folder.
"""

import copy
import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from kubeflow.training import (
    ApiClient,
    KubeflowOrgV1PyTorchJob,
    KubeflowOrgV1PyTorchJobSpec,
    KubeflowOrgV1ReplicaSpec,
    KubeflowOrgV1RunPolicy,
    KubeflowOrgV1SchedulingPolicy,
)

from components.jobs import rules
from model import restart_policy as policies
from model.config.load import load_config
from model.config.schema import micro_batch_size
from model.errors import ConfigError

Manifest = dict[str, Any]
Api = Literal["pytorchjob", "trainjob"]
POD_TEMPLATE = "training"
"""Name of the PodTemplate."""
CONTAINER = "pytorch"
"""Name of the main container in the PodTemplate, as the operator requires it."""
WEB = "mplug-video/web"
"""Label of pods that the network policies allow to access the internet."""
QUEUE_ANNOTATION = "scheduling.volcano.sh/queue-name"
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
KEPT_S = 7 * 24 * 3600
"""Seconds after which a finished job is removed."""
LONGEST_NAME = 50
"""Pod names, <name>-worker-<number>, must be DNS labels of at most 63 characters."""
FROM_CLUSTER = {"output": "$(MPLUG_ROOT)", "tracking.uri": "$(MLFLOW_TRACKING_URI)"}
"""Settings of a training job from the configuration of the cluster. Kubernetes expands the variables."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The parameters of a job."""

    command: tuple[str, ...]
    """Arguments of `mplug`: ("train", "pretrain_1.3b", "data.shards=s3://…"). "train" makes a training job, any other
    command a job with one pod."""
    name: str = ""
    """Empty: derived from the command and a digest, so that the same job has the same name."""
    nodes: int = 1
    processes: int = 0
    """Per node; 0: one per GPU of the PodTemplate, or one."""
    image: str = ""
    """Empty: that of the PodTemplate."""
    deadline_s: int = 0
    """0: none."""

    @property
    def is_training(self) -> bool:
        return self.command[0] == "train"


def render_job(launch: Launch, pod_template: Manifest, namespace: str, api: Api = "pytorchjob") -> list[Manifest]:
    """The manifests of a job; the job itself is the last. Raises ConfigError for settings or a PodTemplate that break a
    rule."""
    if launch.is_training:
        _check_settings(launch, launch.nodes * _processes(launch, pod_template))
    pod, name = _pod(launch, pod_template), _name(launch, pod_template, api)
    if not launch.is_training:
        documents = _job(launch, pod)
    elif api == "trainjob":
        documents = _trainjob(launch, pod_template, pod, name)
    else:
        documents = [_pytorchjob(launch, pod_template, pod)]
    own = pod_template["metadata"].get("labels") or {}
    labels = {"app.kubernetes.io/name": POD_TEMPLATE, "app.kubernetes.io/part-of": "mplug-video", **own}
    for document in documents:
        document["metadata"] = {"name": name, "namespace": namespace, "labels": labels}
    if wrong := [problem for document in documents for problem in rules.problems(document)]:
        raise ConfigError("\n".join(wrong))
    return documents


def load_pod_template(overlay: Path) -> tuple[Manifest, str]:
    """The PodTemplate of an overlay, and its namespace. Needs kubectl, but no cluster."""
    for document in overlay_documents(overlay):
        if document["kind"] == "PodTemplate" and document["metadata"]["name"] == POD_TEMPLATE:
            return document, document["metadata"].get("namespace", "default")
    raise ConfigError(f"{overlay} must hold a PodTemplate named {POD_TEMPLATE}, as k8s/base does; it holds none.")


def overlay_documents(overlay: Path) -> list[Manifest]:
    """All objects of an overlay. Raises ConfigError if kubectl cannot build it."""
    built = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True)
    if built.returncode:
        raise ConfigError(f"{overlay} cannot be built by kubectl: {' '.join(built.stderr.split())[:300]}")
    return list(yaml.safe_load_all(built.stdout))


def _check_settings(launch: Launch, processes: int) -> None:
    """Raises the ConfigError that `mplug train` would raise in the pod."""
    if len(launch.command) < 2:
        raise ConfigError("train must be given a preset or a .yaml file, as in `mplug train`.")
    _, config, *settings = _arguments(launch)
    micro_batch_size(load_config(config, [setting for setting in settings if not setting.startswith("--")]), processes)


def _pytorchjob(launch: Launch, pod_template: Manifest, pod: Manifest) -> Manifest:
    """A job of training-operator 1.9, built from the models of its SDK. The pod stays a dictionary: the pod models of
    the Kubernetes client are older than the cluster and would drop fields."""
    queue = (pod_template["metadata"].get("annotations") or {}).get(QUEUE_ANNOTATION)
    policy = KubeflowOrgV1RunPolicy(
        clean_pod_policy="Running",  # "None" keeps other pods running after a failure; "All" deletes the logs
        ttl_seconds_after_finished=KEPT_S,
        active_deadline_seconds=launch.deadline_s or None,
        scheduling_policy=KubeflowOrgV1SchedulingPolicy(queue=queue) if queue else None,
    )
    counts = {"Master": 1, "Worker": launch.nodes - 1}
    replicas = {
        name: KubeflowOrgV1ReplicaSpec(replicas=count, restart_policy=policies.POD_RESTART_POLICY, template=pod)
        for name, count in counts.items()
        if count
    }
    spec = KubeflowOrgV1PyTorchJobSpec(
        # always set: without a GPU, the operator's "auto" is one process per core
        nproc_per_node=str(_processes(launch, pod_template)),
        pytorch_replica_specs=replicas,
        run_policy=policy,
    )
    job = KubeflowOrgV1PyTorchJob(api_version="kubeflow.org/v1", kind="PyTorchJob", spec=spec)
    return ApiClient().sanitize_for_serialization(job)


def _trainjob(launch: Launch, pod_template: Manifest, pod: Manifest, name: str) -> list[Manifest]:
    documents = _read("trainjob.yaml")
    runtime, job = documents
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    _put_pod(replicated["template"]["spec"]["template"], pod)
    replicated["template"]["spec"]["template"]["spec"]["containers"][0]["name"] = replicated["name"]
    job["spec"]["runtimeRef"]["name"] = name
    job["spec"]["trainer"] = {"numNodes": launch.nodes, "numProcPerNode": _processes(launch, pod_template)}
    _limit_retries(replicated["template"]["spec"], policies.MAX_POD_RESTARTS)
    if launch.deadline_s:
        job["spec"]["activeDeadlineSeconds"] = launch.deadline_s
    return documents


def _job(launch: Launch, pod: Manifest) -> list[Manifest]:
    documents = _read("job.yaml")
    spec = documents[0]["spec"]
    _put_pod(spec["template"], pod)
    _limit_retries(spec, policies.JOB_RETRIES)
    if launch.deadline_s:
        spec["activeDeadlineSeconds"] = launch.deadline_s
    return documents


def _limit_retries(spec: Manifest, retries: int) -> None:
    spec["backoffLimit"] = retries
    (fail,) = (rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    fail["onExitCodes"]["values"] = [*policies.PERMANENT]


def _put_pod(template: Manifest, pod: Manifest) -> None:
    """Merges the pod of the PodTemplate into the template of a job, whose own fields win."""
    template["metadata"] = pod["metadata"]
    template["spec"] = {**pod["spec"], **template["spec"]}


def _pod(launch: Launch, pod_template: Manifest) -> Manifest:
    pod: Manifest = copy.deepcopy(pod_template["template"])
    container = find_container(pod)
    container["command"], container["args"] = ["mplug"], list(_arguments(launch))
    pod["spec"].pop("restartPolicy", None)  # the API server's default; the policy of the job applies
    if launch.image:
        container["image"] = launch.image
    if launch.command[:2] == ("data", "download"):
        pod["metadata"]["labels"][WEB] = "true"
    if not launch.is_training:  # only training pods serve metrics
        container.pop("livenessProbe", None)
        container.pop("ports", None)
    _share_resources(launch, pod)
    return pod


def find_container(pod: Manifest) -> Manifest:
    """The main container of a pod."""
    found: list[Manifest] = [container for container in pod["spec"]["containers"] if container["name"] == CONTAINER]
    if not found:
        raise ConfigError(f"the PodTemplate {POD_TEMPLATE} must have a container named {CONTAINER}.")
    return found[0]


def _arguments(launch: Launch) -> tuple[str, ...]:
    if not launch.is_training:
        return launch.command
    given = {argument.partition("=")[0] for argument in launch.command}
    return *launch.command, *(f"{key}={value}" for key, value in FROM_CLUSTER.items() if key not in given)


def gpu_resource(pod_template: Manifest) -> tuple[str, int]:
    """Resource name and number of the GPUs of a pod."""
    limits = find_container(pod_template["template"]).get("resources", {}).get("limits", {})
    return next(((name, int(count)) for name, count in limits.items() if name.endswith("/gpu")), ("", 0))


def _processes(launch: Launch, pod_template: Manifest) -> int:
    if launch.processes:
        return launch.processes
    return (gpu_resource(pod_template)[1] or 1) if launch.is_training else 1


def _share_resources(launch: Launch, pod: Manifest) -> None:
    """Scales the resources: a job that uses one of eight GPUs requests an eighth of the PodTemplate's resources."""
    pod_template = {"template": pod}
    name, gpus = gpu_resource(pod_template)
    if not gpus:
        return
    taken = 0 if launch.command[0] == "data" else _processes(launch, pod_template)
    if taken > gpus:
        raise ConfigError(
            f"processes must be at most the GPUs of the PodTemplate, {gpus} per node, got {taken}. Raise the nodes."
        )
    resources = find_container(pod)["resources"]
    share = max(taken, 1) / gpus
    for amounts in resources.values():
        for key, amount in amounts.items():
            amounts[key] = _scaled(amount, share) if key in ("cpu", "memory") else amount
    for volume in pod["spec"].get("volumes", []):
        memory = volume.get("emptyDir", {})
        if memory.get("medium") == "Memory" and "sizeLimit" in memory:
            memory["sizeLimit"] = _scaled(memory["sizeLimit"], share)
    resources["limits"][name] = str(taken)
    if not taken:
        del resources["limits"][name]


def _scaled(quantity: str | int, share: float) -> str:
    """A share of a Kubernetes quantity, rounded up."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    scaled = float(number) * share
    return str(quantity) if share == 1 else f"{-int(-scaled // 1)}{unit}"


def _name(launch: Launch, pod_template: Manifest, api: Api) -> str:
    longest = rules.longest_trainjob_name(launch.nodes) if api == "trainjob" else LONGEST_NAME
    if launch.name:
        if not NAME.fullmatch(launch.name) or len(launch.name) > longest:
            rule = f"lower-case letters, digits and dashes, a letter first, at most {longest} of them"
            raise ConfigError(f"the name of a job must be {rule}, got {launch.name!r}.")
        return launch.name
    facts = [launch.command, launch.nodes, _processes(launch, pod_template), launch.image]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
    words = [word for word in launch.command if "=" not in word and not word.startswith("-")][:2]
    stem = re.sub(r"[^a-z0-9]+", "-", "-".join(word.rpartition("/")[2] for word in words).lower())
    return f"{stem.strip('-')[: longest - 9].strip('-')}-{digest}"


def _read(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all(Path(__file__).with_name(file).read_text(encoding="utf-8")))
