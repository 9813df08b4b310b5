"""Reads the Argo workflow of a Kubeflow Pipelines run: its steps, why they wait and how they ended. Knows no kfp.

The API of Kubeflow Pipelines only has the names of Argo's nodes (`executor(0)`), without pods and reasons.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from components.jobs.client import Cluster
from components.jobs.manifests import Manifest
from model.errors import ATTEMPTS, LOST, ClusterError
from model.pipeline_run import Outcome

NOTED = re.compile(r"exit code (\d+): (.+)")
"""Format of a step's termination log (model.errors.TERMINATION_LOG)."""
ENDED = re.compile(r"\(exit code (\d+)\)")
STAGES = ("exit-handler-1", "stages")
"""Names of the node that contains all stages."""
LOG_LINES = 15
FOR_MEMORY = "OOMKilled"


@dataclass(frozen=True)
class Step:
    """A step of a pipeline run."""

    name: str
    phase: str
    message: str
    node: str
    """Name of the node in the workflow."""

    @property
    def code(self) -> int:
        """Exit code of the step's command. Argo's exit code is that of the KFP launcher, which is always 1.

        A pod that was evicted or whose node was lost has none. An OOM kill counts as permanent.
        """
        if FOR_MEMORY in self.message:
            return ATTEMPTS
        found = NOTED.search(self.message) or ENDED.search(self.message)
        return int(found[1]) if found else LOST

    @property
    def reason(self) -> str:
        if FOR_MEMORY in self.message:
            return "OOM-killed at the limit of its pod: give the step more (…_memory), as k8s/README.md says."
        noted = NOTED.search(self.message)
        return noted[2].strip() if noted else self.message or "no reason is known."


def workflow_of_run(cluster: Cluster, run_id: str) -> Manifest | None:
    """None if the run is not on this cluster. Raises ClusterError without permission to read workflows."""
    path = f"/apis/argoproj.io/v1alpha1/namespaces/{cluster.namespace}/workflows"
    found = cluster.read(f"{path}?labelSelector=pipeline%2Frunid%3D{run_id}")["items"]
    return found[0] if found else None


def workflow_outcome(workflow: Manifest) -> Outcome | None:
    """Outcome of the stages while the exit handler runs; None if the workflow has no nodes."""
    spec = workflow.get("spec") or {}
    if spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown"):
        return "cancelled"
    stages = [node for node in _nodes(workflow) if node.get("displayName") in STAGES]
    if not stages:
        return None
    return "succeeded" if all(node.get("phase") == "Succeeded" for node in stages) else "failed"


def workflow_steps(workflow: Manifest) -> Iterator[Step]:
    """The steps that have a pod; only the last attempt of a retried step."""
    retried = [node for node in _nodes(workflow) if node.get("type") == "Retry"]
    attempts = {child for node in retried for child in (node.get("children") or [])[:-1]}
    for node in _nodes(workflow):
        if node.get("type") == "Pod" and node.get("id") not in attempts:
            message = " ".join(str(node.get("message", "")).split())
            yield Step(step_name(node.get("name", "")), node.get("phase", ""), message, node.get("name", ""))


def failed_steps(workflow: Manifest) -> list[Step]:
    return [step for step in workflow_steps(workflow) if step.phase in ("Failed", "Error")]


def step_name(node: str) -> str:
    """`train` of `run-x2x4z.root(0).tasks(0).iteration(1:1)(0).train(0).executor(0)`, and of its `train-driver(0)`."""
    parts = [re.sub(r"\(.*", "", part) for part in re.split(r"\.(?![^(]*\))", node)]
    if parts[-1] == "executor" and len(parts) > 1:
        parts.pop()
    return parts[-1].removesuffix("-driver")


def last_lines(cluster: Cluster, workflow: Manifest, step: Step) -> list[str]:
    """The end of a step's log; empty if its pod no longer exists."""
    selector = f"workflows.argoproj.io%2Fworkflow%3D{workflow['metadata']['name']}"
    try:
        pods = cluster.read(f"/api/v1/namespaces/{cluster.namespace}/pods?labelSelector={selector}")["items"]
        for pod in pods:
            if (pod["metadata"].get("annotations") or {}).get("workflows.argoproj.io/node-name") == step.node:
                return cluster.log_end(pod["metadata"]["name"], "main", LOG_LINES)
    except ClusterError:  # deleted meanwhile, or no permission
        pass
    return []


def _nodes(workflow: Manifest) -> list[Manifest]:
    """The nodes of a workflow, which Argo compresses if there are many."""
    status = workflow.get("status") or {}
    if packed := status.get("compressedNodes"):
        return list(json.loads(gzip.decompress(base64.b64decode(packed))).values())
    return list((status.get("nodes") or {}).values())
