"""Ends a pipeline run on Kubeflow Pipelines; called by the exit handler. Knows no kfp.

Kubeflow Pipelines kills a step half a second after SIGTERM, and a job that the step has created keeps running. So the
exit handler, which runs after success, failure and cancellation, stops the jobs of its run.
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
"""Variables of a step, set by Kubernetes: name and namespace of the Argo workflow of its run."""
RUN_LABEL = "mplug-video/run"
"""Label of a job with the ID of the pipeline run that created or adopted it."""
ABANDONED = "mplug-video/given-up"
"""Annotation of a suspended job with the reason."""
SAVED_WITHIN_S = 180.0
"""Time for the last checkpoint: the grace period of the pods, 120 s, and the kubelet."""


def end_run(namespace: str) -> tuple[Outcome | None, list[str]]:
    """Stops the running jobs of this pipeline run. Returns its outcome, and one line per failed step.

    The outcome is None outside of Kubeflow Pipelines, or if the workflow cannot be read.
    """
    run_id = os.environ.get(RUN_ID, "")
    if not run_id:
        return None, []
    cluster = Cluster(namespace, patience_s=60)
    stop_jobs(cluster, run_id)
    return _outcome(cluster)


def stop_jobs(cluster: Cluster, run_id: str) -> None:
    """Deletes the running training jobs of a pipeline run, and waits for their pods, which save a checkpoint.

    Only warns if the cluster refuses or does not answer: a cluster without training-operator has no such jobs.
    """
    try:
        stopped = [job for job in cluster.labelled("PyTorchJob", f"{RUN_LABEL}={run_id}") if _is_running(job)]
        for job in stopped:
            log.warning("stopping %s, which saves a checkpoint", job["metadata"]["name"])
            cluster.delete("PyTorchJob", job["metadata"]["name"], job["metadata"]["uid"])
        deadline = time.monotonic() + SAVED_WITHIN_S
        while any(cluster.pods("PyTorchJob", job["metadata"]["name"]) for job in stopped):
            if time.monotonic() > deadline:
                log.warning("pods of the run still exist after %g s", SAVED_WITHIN_S)
                break
            time.sleep(1)
    except (ClusterError, OutageError) as error:
        log.warning("training jobs of the run cannot be listed: %s", error)


def _is_running(job: Manifest) -> bool:
    if ABANDONED in (job["metadata"].get("annotations") or {}):
        return False
    return not (find_condition(job, "Failed") or find_condition(job, KINDS["PyTorchJob"].succeeded))


def _outcome(cluster: Cluster) -> tuple[Outcome | None, list[str]]:
    path = f"/apis/argoproj.io/v1alpha1/namespaces/{os.environ.get(NAMESPACE)}/workflows/{os.environ.get(WORKFLOW)}"
    try:
        workflow = cluster.read(path)
    except (ClusterError, OutageError) as error:
        log.warning("the workflow cannot be read, the outcome is taken from the stages: %s", error)
        return None, []
    return workflow_outcome(workflow), [f"{step.name}: {step.reason}" for step in failed_steps(workflow)]
