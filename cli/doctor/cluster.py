"""Checks of a cluster: permissions, CRDs, installed objects, and whether a job fits."""

from collections.abc import Iterator
from typing import Any

from cli.doctor.controllers import init_container, kueue, retry_policy
from cli.doctor.finding import Finding, failed, fine, warned
from components.jobs import rules
from components.jobs.client import Cluster, parse_amount
from components.jobs.launcher import Limits, run_job
from components.jobs.manifests import POD_TEMPLATE, Launch, gpu_resource, render_job
from model.errors import ClusterError, ConfigError

OLDEST = (1, 27)
"""Kubernetes version with pod failure policies and topology spreading by job."""
RIGHTS = [
    ("create", "kubeflow.org", "pytorchjobs"),
    ("watch", "kubeflow.org", "pytorchjobs"),
    ("delete", "kubeflow.org", "pytorchjobs"),
    ("create", "batch", "jobs"),
    ("get", "", "podtemplates"),
    ("list", "", "pods"),
    ("get", "", "pods/log"),
    ("list", "", "events"),
]
APPLY = "kubectl apply -k k8s/overlays/<yours>"


def cluster_checks(namespace: str, nodes: int, processes: int) -> Iterator[Finding]:
    cluster = Cluster(namespace, patience_s=5)
    yield _version(cluster)
    yield from _rights(cluster)
    yield (operator := _operator(cluster))
    if operator.kind == "failure":
        return
    yield from _installed(cluster)
    try:
        pod_template = cluster.pod_template(POD_TEMPLATE)
    except ClusterError:
        yield failed("PodTemplate", f"namespace {cluster.namespace} has no PodTemplate {POD_TEMPLATE}", APPLY)
        return
    try:
        each = processes or gpu_resource(pod_template)[1] or 1
        command = ("train", "tiny_pretraining", "data.shards=x", "model.decoder=x", f"data.batch_size={nodes * each}")
        (job,) = render_job(Launch(command=command, nodes=nodes, processes=processes), pod_template, cluster.namespace)
    except ConfigError as error:
        yield failed("PodTemplate", " ".join(str(error).split()), "Fix the overlay and apply it again.")
        return
    yield fine("PodTemplate", f"{nodes} pods with {each} processes meet every rule")
    pod = next(pod for _, pod in rules.pods(job))
    yield from init_container(cluster, dict(pod), nodes)
    yield from kueue(cluster, pod_template)
    yield from retry_policy(cluster)
    yield from _quota(cluster, pod, nodes)
    yield from _nodes(cluster, gpu_resource({"template": pod}), nodes)


def _version(cluster: Cluster) -> Finding:
    found = cluster.read("/version")
    version = tuple(int("".join(filter(str.isdigit, found[key]))) for key in ("major", "minor"))
    message = f"Kubernetes {found['gitVersion']}"
    if version < OLDEST:
        return warned("API server", message, "1.27 is the oldest supported version.")
    return fine("API server", message)


def _rights(cluster: Cluster) -> Iterator[Finding]:
    missing = [
        f"{verb} {resource}" for verb, group, resource in RIGHTS if not cluster.is_allowed(verb, group, resource)
    ]
    if missing:
        remedy = f"Request them in namespace {cluster.namespace}; Role launcher in k8s/base/rbac lists them."
        yield failed("rights", f"not allowed: {', '.join(missing)}", remedy)
    else:
        yield fine("rights", f"all that a job needs, in namespace {cluster.namespace}")


def _operator(cluster: Cluster) -> Finding:
    try:
        kinds = {item["kind"] for item in cluster.read("/apis/kubeflow.org/v1")["resources"]}
    except ClusterError:
        kinds = set()
    if "PyTorchJob" not in kinds:
        return failed("training-operator", "the cluster has no PyTorchJob CRD", "Install training-operator 1.9.")
    return fine("training-operator", "PyTorchJob kubeflow.org/v1")


def _installed(cluster: Cluster) -> Iterator[Finding]:
    for kind, name in (("configmaps", "mplug-config"), ("secrets", "mplug-s3")):
        try:
            cluster.read(f"/api/v1/namespaces/{cluster.namespace}/{kind}/{name}")
        except ClusterError as error:
            if error.status == 403:
                yield warned(name, "cannot be read: permission denied", "")
            elif kind == "secrets":
                yield warned(name, "does not exist", "Not needed with a cloud role; otherwise run k8s/secrets.sh.")
            else:
                yield failed(name, "does not exist", APPLY)
        else:
            yield fine(name, "exists")


def _quota(cluster: Cluster, pod: Any, nodes: int) -> Iterator[Finding]:
    wanted = counted(pod)
    try:
        quotas = cluster.read(f"/api/v1/namespaces/{cluster.namespace}/resourcequotas")["items"]
    except ClusterError as error:
        yield warned("quota", f"cannot be read: {error}", "")
        return
    for quota in quotas:
        status = quota.get("status") or {}
        hard, used = status.get("hard") or quota["spec"]["hard"], status.get("used") or {}
        for key, limit in hard.items():
            if key not in wanted:
                continue
            left = parse_amount(limit) - parse_amount(used.get(key, "0"))
            if wanted[key] * nodes > left:
                message = f"{key}: the job asks for {wanted[key] * nodes:g}, {left:g} of {limit} are left"
                yield failed("quota", message, f"Raise quota {quota['metadata']['name']}, or take fewer nodes.")
                return
    yield fine("quota", "the job fits")


def _nodes(cluster: Cluster, gpus: tuple[str, int], nodes: int) -> Iterator[Finding]:
    name, count = gpus
    if not count:
        return
    try:
        found = cluster.read("/api/v1/nodes")["items"]
    except ClusterError:
        yield warned("GPUs", "nodes cannot be read: permission denied", "")
        return
    able = sum(int(parse_amount(node["status"]["allocatable"].get(name, "0")) // count) for node in found)
    message = f"there is room for {able} pods with {count} of {name} each, the job has {nodes}"
    if able < nodes:
        yield failed("GPUs", message, "Take fewer --nodes, or --processes; or add nodes and the device plugin.")
    else:
        yield fine("GPUs", message)


def counted(pod: Any) -> dict[str, float]:
    """The resources of one pod by their names in quotas."""
    found: dict[str, float] = {"pods": 1, "count/pods": 1}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources", {})
        limits = resources.get("limits", {})
        for name, quantity in {**limits, **resources.get("requests", {})}.items():
            for key in (name, f"requests.{name}"):
                found[key] = found.get(key, 0.0) + parse_amount(quantity)
        for name, quantity in limits.items():
            found[f"limits.{name}"] = found.get(f"limits.{name}", 0.0) + parse_amount(quantity)
    return found


def check_in_pod(namespace: str) -> None:
    """Runs the checks in a pod with the image, network policies, credentials and volumes of a job.

    Raises JobFailedError if the pod does not start, or if a check fails.
    """
    cluster = Cluster(namespace)
    pod_template = cluster.pod_template(POD_TEMPLATE)
    _, gpus = gpu_resource(pod_template)
    command = ("doctor", "--root=$(MPLUG_ROOT)", "--tracking-uri=$(MLFLOW_TRACKING_URI)", "--gpus", str(gpus))
    launch = Launch(command=command, name="doctor", processes=gpus or 1)
    cluster.delete("Job", "doctor")
    run_job(cluster, render_job(launch, pod_template, cluster.namespace), Limits(deadline_s=600))
