"""A double of training-operator 1.9: pods of a PyTorchJob and their environment, restarts by exit code, conditions.

For clusters without the operator: `python -m tests.helpers.operator_double`.
"""

import copy
import datetime
import os
import sys
import time
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client import ApiException

from cli.doctor.controllers import DEFAULT_TEMPLATE

Object = dict[str, Any]
GROUP = ("kubeflow.org", "v1")
LABEL = "training.kubeflow.org"
INIT_IMAGE = os.environ.get("INIT_IMAGE", "alpine:3.10")
"""Default of the operator's option --pytorch-init-container-image."""


def replicas(job: Object) -> list[tuple[str, int]]:
    """(role, index) of every pod, starting with the master."""
    specs = job["spec"]["pytorchReplicaSpecs"]
    return [(role, index) for role in ("Master", "Worker") if role in specs for index in range(specs[role]["replicas"])]


def pod_name(job: Object, role: str, index: int) -> str:
    return f"{job['metadata']['name']}-{role.lower()}-{index}"


def pod_of(job: Object, role: str, index: int, master: str, init_containers: str) -> Object:
    """The pod that the operator creates. Workers get an init container and the address of the `master`."""
    template = copy.deepcopy(job["spec"]["pytorchReplicaSpecs"][role]["template"])
    total, rank = len(replicas(job)), index + (role == "Worker")
    metadata = template["metadata"]
    metadata["name"] = pod_name(job, role, index)
    metadata["labels"] |= {
        f"{LABEL}/job-name": job["metadata"]["name"],
        f"{LABEL}/replica-type": role.lower(),
        f"{LABEL}/replica-index": str(index),
        f"{LABEL}/operator-name": "pytorchjob-controller",
    }
    processes = job["spec"]["nprocPerNode"]
    environment = {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": "23456",
        "RANK": str(rank),
        "WORLD_SIZE": str(total * int(processes)),
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": "23456",
        "PET_NODE_RANK": str(rank),
        "PET_NNODES": str(total),
        "PET_NPROC_PER_NODE": processes,
    }
    for container in template["spec"]["containers"]:
        container["env"] = [*container["env"], *({"name": key, "value": value} for key, value in environment.items())]
    template["spec"]["restartPolicy"] = "Never"  # the operator replaces ExitCode
    if role == "Worker":
        filled = init_containers.replace("{{.InitContainerImage}}", INIT_IMAGE).replace("{{.MasterAddr}}", master)
        template["spec"]["initContainers"] = yaml.safe_load(filled)
    return {"apiVersion": "v1", "kind": "Pod", **template}


class Operator:
    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.core, self.custom = client.CoreV1Api(), client.CustomObjectsApi()

    def reconcile(self, job: Object) -> None:
        conditions = {
            item["type"] for item in (job.get("status") or {}).get("conditions", []) if item["status"] == "True"
        }
        if conditions & {"Succeeded", "Failed"}:
            return
        self.warn(job)
        selector = f"{LABEL}/job-name={job['metadata']['name']}"
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        pods = {pod.metadata.name: pod for pod in found}
        for role, index in replicas(job):
            name = pod_name(job, role, index)
            if name not in pods:
                self.create(job, role, index)
            elif pods[name].status.phase == "Failed":
                code = exit_code(pods[name])
                if code < 128:
                    return self.conclude(job, "Failed", f"{name} ended with exit code {code}")
                self.core.delete_namespaced_pod(name, self.namespace)
        master = pods.get(pod_name(job, "Master", 0))
        if master and master.status.phase == "Succeeded":
            return self.conclude(job, "Succeeded", "the master has succeeded")
        if "Running" not in conditions and master and master.status.phase == "Running":
            self.conclude(job, "Running", "the master is running")

    def create(self, job: Object, role: str, index: int) -> None:
        name = job["metadata"]["name"]
        pod = pod_of(job, role, index, f"{name}-master-0", self.init_containers())
        owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": name, "uid": job["metadata"]["uid"]}
        pod["metadata"]["ownerReferences"] = [{**owner, "controller": True, "blockOwnerDeletion": True}]
        self.core.create_namespaced_pod(self.namespace, pod)
        service = {
            "metadata": {"name": pod["metadata"]["name"], "ownerReferences": pod["metadata"]["ownerReferences"]},
            "spec": {
                "clusterIP": "None",
                "ports": [{"name": "pytorchjob-port", "port": 23456}],
                "selector": {
                    f"{LABEL}/job-name": name,
                    f"{LABEL}/replica-type": role.lower(),
                    f"{LABEL}/replica-index": str(index),
                },
            },
        }
        try:
            self.core.create_namespaced_service(self.namespace, service)
        except ApiException as error:
            if error.status != 409:
                raise

    def init_containers(self) -> str:
        """The template that is mounted into the operator's Deployment, or else the default."""
        try:
            pod = client.AppsV1Api().read_namespaced_deployment("training-operator", "kubeflow").spec.template.spec
        except ApiException as error:
            if error.status != 404:
                raise
            return DEFAULT_TEMPLATE
        mounted = {mount.name for mount in pod.containers[0].volume_mounts or [] if mount.mount_path == "/etc/config"}
        for volume in pod.volumes or []:
            if volume.name in mounted:
                found = self.core.read_namespaced_config_map(volume.config_map.name, "kubeflow")
                return str(found.data["initContainer.yaml"])
        return DEFAULT_TEMPLATE

    def warn(self, job: Object) -> None:
        """Emits the operator's warning for a job whose pods set a restart policy."""
        specs = job["spec"]["pytorchReplicaSpecs"].values()
        if not any("restartPolicy" in spec["template"]["spec"] for spec in specs):
            return
        metadata = {"name": f"{job['metadata']['name']}.warning", "namespace": self.namespace}
        involved = {"kind": "PyTorchJob", "name": job["metadata"]["name"], "namespace": self.namespace}
        message = "Restart policy in pod template overridden by restart policy in replica spec"
        event = {"metadata": metadata, "involvedObject": involved, "type": "Warning", "message": message}
        try:
            self.core.create_namespaced_event(self.namespace, {**event, "reason": "SetPodTemplateRestartPolicy"})
        except ApiException as error:
            if error.status != 409:
                raise

    def conclude(self, job: Object, condition: str, message: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = job.get("status") or {}
        new = {"type": condition, "status": "True", "reason": f"PyTorchJob{condition}", "message": message}
        body = {
            "conditions": [*status.get("conditions", []), {**new, "lastTransitionTime": now, "lastUpdateTime": now}],
            "startTime": status.get("startTime", now),
            "replicaStatuses": {},
        }
        name = job["metadata"]["name"]
        self.custom.patch_namespaced_custom_object_status(*GROUP, self.namespace, "pytorchjobs", name, {"status": body})


def exit_code(pod: Any) -> int:
    """Exit code of the container; an evicted or lost pod has none and is restarted."""
    ended = [status.state.terminated for status in pod.status.container_statuses or [] if status.state.terminated]
    return ended[0].exit_code if ended else 255


def main() -> None:
    config.load_kube_config(os.environ.get("KUBECONFIG"))
    operator = Operator(sys.argv[1])
    while True:
        try:
            for job in operator.custom.list_namespaced_custom_object(*GROUP, operator.namespace, "pytorchjobs")[
                "items"
            ]:
                operator.reconcile(job)
        except (ApiException, OSError) as error:
            print(str(error)[:300], flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
