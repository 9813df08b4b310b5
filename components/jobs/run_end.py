"""The end of a pipeline's run on Kubeflow Pipelines, as its exit handler sees it. No kfp here.

Kubeflow Pipelines ends a step half a second after it has asked it to: the container goes, and a job that the step has
started runs on. So the exit handler, which runs after success, failure and cancellation, stops the jobs of its run.
"""

import logging
import os
import time

from components.jobs.client import KINDS, Cluster, find_condition
from components.jobs.manifests import Manifest
from components.jobs.workflow import failed_steps, workflow_outcome
from model.errors import ClusterError, OutageError
from model.pipeline_run import RUN_ID, Outcome

log = logging.getLogger("mplug")
WORKFLOW, NAMESPACE = "MPLUG_KFP_WORKFLOW", "MPLUG_KFP_NAMESPACE"
"""Variables of a step that Kubernetes fills in: name and namespace of Argo's workflow for its run."""
RUN_LABEL = "mplug-video/run"
"""Label of a job: id of the pipeline's run that has started it, or taken it over."""
ABANDONED = "mplug-video/given-up"
"""Annotation of a job that was stopped: why."""
SAVED_WITHIN_S = 180.0
"""For the last checkpoint: the pods' grace period of 120 s, and the kubelet."""


def end_run(namespace: str) -> tuple[Outcome | None, list[str]]:
    """Stops the jobs of this run that still run. Returns how the run has ended, and a line for each failed step.

    No outcome outside Kubeflow Pipelines, and if the workflow cannot be read.
    """
    run_id = os.environ.get(RUN_ID, "")
    if not run_id:
        return None, []
    cluster = Cluster(namespace, patience_s=60)
    stop_jobs(cluster, run_id)
    return _outcome(cluster)


def stop_jobs(cluster: Cluster, run_id: str) -> None:
    """Deletes the training jobs of a run that still run, and waits for their pods: each saves a checkpoint.

    Only warns if the cluster refuses or does not answer; one without training-operator knows no such jobs.
    """
    try:
        _stop_jobs(cluster, run_id)
    except (ClusterError, OutageError) as error:
        log.warning("training jobs of the run cannot be looked at: %s", error)


def _stop_jobs(cluster: Cluster, run_id: str) -> None:
    stopped = [job for job in cluster.labelled("PyTorchJob", f"{RUN_LABEL}={run_id}") if _is_running(job)]
    for job in stopped:
        log.warning("%s still runs and is stopped; it saves a checkpoint", job["metadata"]["name"])
        cluster.delete("PyTorchJob", job["metadata"]["name"], job["metadata"]["uid"])
    deadline = time.monotonic() + SAVED_WITHIN_S
    while any(cluster.pods("PyTorchJob", job["metadata"]["name"]) for job in stopped):
        if time.monotonic() > deadline:
            log.warning("pods of the run are still there after %g s", SAVED_WITHIN_S)
            break
        time.sleep(1)


def _is_running(job: Manifest) -> bool:
    if ABANDONED in (job["metadata"].get("annotations") or {}):
        return False
    return not (find_condition(job, "Failed") or find_condition(job, KINDS["PyTorchJob"].succeeded))


def _outcome(cluster: Cluster) -> tuple[Outcome | None, list[str]]:
    path = f"/apis/argoproj.io/v1alpha1/namespaces/{os.environ.get(NAMESPACE)}/workflows/{os.environ.get(WORKFLOW)}"
    try:
        workflow = cluster.read(path)
    except (ClusterError, OutageError) as error:
        log.warning("the stages alone say how the run has ended: %s", error)
        return None, []
    return workflow_outcome(workflow), [f"{step.name}: {step.reason}" for step in failed_steps(workflow)]
