"""Follows a Kubeflow Pipelines run to its end, and retries transient failures."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import kfp_server_api

from components.jobs.client import Cluster
from components.jobs.manifests import Manifest
from components.jobs.pod_status import waiting_reasons
from components.jobs.run_end import RUN_LABEL, stop_jobs
from components.jobs.workflow import Step, failed_steps, last_lines, workflow_of_run, workflow_outcome, workflow_steps
from model.errors import FAILED, ClusterError, OutageError, ProcessFailedError
from model.restart_policy import is_restartable
from pipelines.catalog import PIPELINES, compiled_documents, pipeline_parameters
from pipelines.kfp_host import Host, call_api

log = logging.getLogger("mplug")
ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
CHECK_EVERY_S = 5.0
RESTARTED_WITHIN_S = 120.0
KUBEFLOW = "kubeflow"
"""Namespace of the steps in a Kubeflow without profiles."""


@dataclass
class Followed:
    """A run and the cluster of its pods. Without a `cluster` only Kubeflow Pipelines is queried."""

    host: Host
    run_id: str
    known: frozenset[str]
    """Names of steps."""
    cluster: Cluster | None
    jobs: Cluster | None = None
    """The namespace of the training jobs."""
    printed: set[str] = field(default_factory=set)
    running: str = ""

    def run(self) -> Any:
        return call_api(kfp_server_api.RunServiceApi(self.host.api()).run_service_get_run, self.run_id)

    def workflow(self) -> Manifest | None:
        if not self.cluster:
            return None
        try:
            found = workflow_of_run(self.cluster, self.run_id)
            if not found:
                self.print_once(
                    f"namespace {self.cluster.namespace} has no workflow of {self.run_id}: is it the right cluster?"
                )
            return found
        except (ClusterError, OutageError) as error:
            self.print_once(f"reasons and logs are only available on Kubeflow's page: {error}")
            return None

    def print_once(self, line: str) -> None:
        if line not in self.printed:
            self.printed.add(line)
            log.info("%s", line)


def follow_run(host: Host, run_id: str, retries: int = 0) -> None:
    """Returns when the run has succeeded. Raises ProcessFailedError with the failed step and its reason.

    A transient failure is retried up to `retries` times, without repeating succeeded steps.
    """
    followed = Followed(host, run_id, step_names(), _cluster(host.namespace or KUBEFLOW))
    followed.jobs = _cluster(_job_namespace(followed.run()))
    while True:
        run, workflow = followed.run(), followed.workflow()
        _report(followed, run, workflow)
        if run.state == "SUCCEEDED":
            log.info("run %s has succeeded", run_id)
            return
        if run.state in ENDED:
            if followed.jobs:
                stop_jobs(followed.jobs, run_id)
            failure = _failure(followed, run, workflow)
            if retries and not workflow:
                log.warning(
                    "not retried: without the workflow of the run it is unknown whether the failure is transient"
                )
            if not retries or not is_restartable(failure.exit_code):
                raise failure
            retries -= 1
            log.warning("%s", failure)
            log.warning("retrying failed steps, %d retries left", retries)
            retry_run(host, run_id)
        time.sleep(CHECK_EVERY_S)


def retry_run(host: Host, run_id: str) -> None:
    """Retries the failed steps of a run, and returns when the run is active again."""
    service = kfp_server_api.RunServiceApi(host.api())
    call_api(service.run_service_retry_run, run_id, patience_s=0)
    deadline = time.monotonic() + RESTARTED_WITHIN_S
    while call_api(service.run_service_get_run, run_id).state in ENDED:
        if time.monotonic() > deadline:
            raise OutageError(f"run {run_id} was not resumed within {RESTARTED_WITHIN_S:g} s. {host.link(run_id)}")
        time.sleep(1)


def cancel_run(host: Host, run_id: str) -> None:
    """Cancels a run, and returns when it has ended and its training jobs have saved a checkpoint.

    The exit handler of a retried run does not run again, so this command stops the jobs itself.
    """
    service = kfp_server_api.RunServiceApi(host.api())
    call_api(service.run_service_terminate_run, run_id)
    while (run := call_api(service.run_service_get_run, run_id)).state not in ENDED:
        time.sleep(1)
    if jobs := _cluster(_job_namespace(run)):
        stop_jobs(jobs, run_id)


def _job_namespace(run: Any) -> str:
    """The parameter `namespace` of a run. All pipelines have the same default."""
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    return str(given.get("namespace") or pipeline_parameters("pretrain")["namespace"]["defaultValue"])


def step_names() -> frozenset[str]:
    """Names of the steps of all pipelines."""
    found: set[str] = set()
    for name in PIPELINES:
        spec = compiled_documents(name)[0]
        for part in (spec["root"], *spec["components"].values()):
            for step, task in part.get("dag", {}).get("tasks", {}).items():
                if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                    found.add(step)
    return frozenset(found)


def _cluster(namespace: str) -> Cluster | None:
    try:
        return Cluster(namespace, patience_s=5)
    except ClusterError as error:
        log.info("reasons and logs are only available on Kubeflow's page: %s", error)
        return None


def _report(followed: Followed, run: Any, workflow: Manifest | None) -> None:
    """Logs the current steps when they change, and the reasons why pods wait."""
    if workflow:
        found = list(workflow_steps(workflow))
        names = sorted({step.name for step in found if step.phase in ("Running", "Pending")} & followed.known)
        for step in found:
            if step.phase == "Pending" and step.message:
                followed.print_once(f"{step.name} waits: {step.message}")
    else:
        details = (run.run_details.task_details if run.run_details else None) or []
        shown = {task.display_name for task in details if task.state == "RUNNING"}
        names = sorted(shown & followed.known)
    for line in _waiting_jobs(followed):
        followed.print_once(line)
    running = ", ".join(names)
    if running and running != followed.running:
        followed.running = running
        log.info("running: %s", running)


def _waiting_jobs(followed: Followed) -> Iterator[str]:
    """Reasons why pods of the run's training jobs wait."""
    if not followed.jobs:
        return
    try:
        for job in followed.jobs.labelled("PyTorchJob", f"{RUN_LABEL}={followed.run_id}"):
            name = job["metadata"]["name"]
            yield from followed.jobs.warnings(name)
            for pod in followed.jobs.pods("PyTorchJob", name):
                yield from waiting_reasons(pod)
    except (ClusterError, OutageError) as error:
        yield f"training jobs cannot be listed: {error}"


def _failure(followed: Followed, run: Any, workflow: Manifest | None) -> ProcessFailedError:
    link = followed.host.link(followed.run_id)
    if run.state == "CANCELED" or (workflow and workflow_outcome(workflow) == "cancelled"):
        return ProcessFailedError(f"run {followed.run_id} was cancelled. {link}")
    failed = failed_steps(workflow) if workflow else []
    if not workflow or not failed:
        details = (run.run_details.task_details if run.run_details else None) or []
        names = sorted({task.display_name for task in details if task.state == "FAILED"} & followed.known)
        message = f"Failed: {', '.join(names)}." if names else ""
        return ProcessFailedError(f"run {followed.run_id} has ended as {run.state}. {message} {link}")
    worst = min(failed, key=lambda step: (is_restartable(step.code), step.node))  # a permanent failure is the cause
    for step in failed:
        _show_log(followed, workflow, step)
    reasons = "\n".join(f"{step.name}: {step.reason}" for step in failed)
    return ProcessFailedError(f"{reasons}\n{link}", worst.code or FAILED)


def _show_log(followed: Followed, workflow: Manifest, step: Step) -> None:
    lines = last_lines(followed.cluster, workflow, step) if followed.cluster else []
    if lines:
        log.info("the end of the log of %s:", step.name)
        for line in lines:
            log.info("  %s", line)
