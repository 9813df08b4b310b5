"""Checks of the controllers of a cluster: training-operator, Kueue, and Argo of Kubeflow Pipelines."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from cli.doctor.finding import Finding, failed, fine, warned
from components.jobs.client import Cluster
from components.jobs.launcher import QUEUE_LABEL
from components.jobs.manifests import Manifest
from model.errors import ClusterError

OPERATOR_NAMESPACE, OPERATOR = "kubeflow", "training-operator"
CONFIG_FOLDER, TEMPLATE = "/etc/config", "initContainer.yaml"
"""Path where training-operator 1.9 reads the template of its init container."""
DEFAULT_IMAGE = "alpine:3.10"
DEFAULT_TEMPLATE = """
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  resources: {limits: {cpu: 100m, memory: 20Mi}, requests: {cpu: 50m, memory: 10Mi}}
  command: [sh, -c, "nslookup {{.MasterAddr}}"]
"""
"""The default of the operator, reduced to the fields that admission checks."""
APPLY = "`kubectl apply -k k8s/operator`, then the patch of k8s/README.md, step 2."


def init_container(cluster: Cluster, pod: Manifest, nodes: int) -> Iterator[Finding]:
    """Checks by a dry run whether admission accepts the pod of a worker as the operator creates it."""
    if nodes == 1:
        return
    try:
        template, image, message = _template(cluster)
        added = _filled(template, image)
    except ClusterError as error:
        yield warned("init container", f"the operator's Deployment cannot be read: {error}", "Ask an administrator.")
        return
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        yield failed("init container", f"the operator's template cannot be read: {' '.join(str(error).split())}", APPLY)
        return
    if not cluster.is_allowed("create", "", "pods"):
        yield warned("init container", f"{message} Not checked with admission: creating pods is not allowed.", "")
        return
    metadata = {key: pod["metadata"].get(key, {}) for key in ("labels", "annotations")}
    metadata["generateName"] = "mplug-doctor-"
    spec = {**pod["spec"], "initContainers": [*(pod["spec"].get("initContainers") or []), *added]}
    refused = cluster.admission_error({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    if "PodSecurity" in refused:
        yield failed("init container", f"{message} A worker would be refused: {refused}", APPLY)
    elif refused:
        yield failed("worker pod", f"it would be refused: {refused}", "Fix the overlay, or raise the quota.")
    elif "nslookup" in template:
        yield warned("init container", f"{message} It waits for a DNS name, without a limit in some images.", APPLY)
    else:
        yield fine("init container", f"{message} Admission accepts a worker with it.")


def _template(cluster: Cluster) -> tuple[str, str, str]:
    """The template of the operator's init container, its image, and their source."""
    path = f"/apis/apps/v1/namespaces/{OPERATOR_NAMESPACE}/deployments/{OPERATOR}"
    spec = cluster.read(path)["spec"]["template"]["spec"]
    (container, *_) = spec["containers"]
    arguments = " ".join([*(container.get("command") or []), *(container.get("args") or [])])
    image = re.search(r"pytorch-init-container-image[= ](\S+)", arguments)
    mounted = {
        mount["name"]: mount
        for mount in container.get("volumeMounts") or []
        if mount["mountPath"].rstrip("/") in (CONFIG_FOLDER, f"{CONFIG_FOLDER}/{TEMPLATE}")
    }
    for volume in spec.get("volumes") or []:
        if volume["name"] in mounted and "configMap" in volume:
            name = volume["configMap"]["name"]
            config = cluster.read(f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/configmaps/{name}")["data"]
            if TEMPLATE in config:
                return config[TEMPLATE], image[1] if image else DEFAULT_IMAGE, f"{name} is mounted."
    return DEFAULT_TEMPLATE, image[1] if image else DEFAULT_IMAGE, "The operator uses its default, nothing is mounted."


def _filled(template: str, image: str) -> list[Any]:
    """Renders the template as the operator does. Raises ValueError if the result is not a list of containers."""
    values = {"InitContainerImage": image, "MasterAddr": "doctor-master-0", "MaxTries": "100"}
    found = yaml.safe_load(re.sub(r"\{\{\s*\.(\w+)\s*\}\}", lambda match: values.get(match[1], "1"), template))
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("it must be a list of containers.")
    return found


def kueue(cluster: Cluster, pod_template: Manifest) -> Iterator[Finding]:
    """Checks Kueue: jobs would wait forever if it is not configured for them."""
    queue = (pod_template["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if not queue:
        return
    config = "/api/v1/namespaces/kueue-system/configmaps/kueue-manager-config"
    try:
        cluster.read(f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{cluster.namespace}/localqueues/{queue}")
        settings = yaml.safe_load(cluster.read(config)["data"]["controller_manager_config.yaml"]) or {}
    except ClusterError as error:
        if error.status == 404:
            remedy = "Kueue 0.15 or newer, `kubectl apply -k k8s/kueue`, and components/kueue in your overlay."
            yield failed("Kueue", f"the PodTemplate names queue {queue}: {error}", remedy)
        else:
            yield warned("Kueue", f"cannot be read: {error}", "")
        return
    known = (settings.get("integrations") or {}).get("frameworks") or []
    if "kubeflow.org/pytorchjob" in known:
        yield fine("Kueue", f"queue {queue}, PyTorchJob among its integrations")
    else:
        remedy = "Add kubeflow.org/pytorchjob to integrations.frameworks of kueue-manager-config, and restart Kueue."
        yield failed("Kueue", "PyTorchJob is not among its integrations: jobs would not wait in the queue", remedy)


def retry_policy(cluster: Cluster) -> Iterator[Finding]:
    """Checks which pipeline steps Argo repeats, if it is installed."""
    path = "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"
    try:
        data = cluster.read(path).get("data") or {}
    except ClusterError:
        return
    policy = next(filter(None, map(_policy, data.values())), "")
    if policy in ("Always", "OnFailure"):
        message = "Argo repeats every failed step, including permanent failures such as a failed gate"
        yield warned("pipeline steps", message, "Set retryPolicy OnError in workflow-controller-configmap.")
    else:
        message = f"Argo's retryPolicy is {policy or 'its default'}: failed steps are not repeated"
        yield fine("pipeline steps", f"{message}; use `mplug pipeline retry` or `submit --wait --retries`")


def _policy(text: str) -> str:
    """retryPolicy of the template defaults in Argo's configuration."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return ""
    while isinstance(tree, dict):
        if "templateDefaults" in tree:
            return str(((tree["templateDefaults"] or {}).get("retryStrategy") or {}).get("retryPolicy") or "")
        tree = tree.get("workflowDefaults") or tree.get("spec")
    return ""
