"""Creates a job on a cluster, or adopts the existing one, and follows it to its end. Knows no kfp.

A restarted pipeline step finds its job by name: a running job is followed, a failed one is replaced. The operator
restarts pods without limit, and does not check the deadline of a job that hangs. The launcher enforces both limits.
"""

import copy
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from components.jobs import rules
from components.jobs.client import KINDS, Cluster, find_condition
from components.jobs.log import show_log
from components.jobs.manifests import POD_TEMPLATE, Launch, Manifest, find_container, render_job
from components.jobs.pod_status import (
    OOM_KILLED,
    JobHistory,
    parse_time,
    pod_exit_codes,
    termination_reasons,
    waiting_reasons,
)
from components.jobs.run_end import ABANDONED, RUN_LABEL
from model.errors import (
    FAILED,
    TERMINATED,
    AttemptsError,
    ClusterError,
    ConfigError,
    JobAbandonedError,
    JobFailedError,
    OutageError,
)
from model.pipeline_run import RUN_ID
from model.restart_policy import MAX_POD_RESTARTS, is_restartable

log = logging.getLogger("mplug")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DIGEST = "mplug-video/digest"
"""Annotation with the digest of a job's manifests. The same name with another digest is another job."""
CHECK_EVERY_S = 20
GONE_WITHIN_S = 300.0
RESUMES_WITHIN_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits after which a job is stopped."""

    deadline_s: float = 0
    """From the start of the job; 0: no deadline."""
    restarts: int = MAX_POD_RESTARTS
    """Restarts of any one pod."""


def train_on_cluster(
    config: str, settings: list[str], nodes: int, processes: int, image: str, namespace: str, deadline_hours: float
) -> None:
    """Runs a training as a job on the cluster of this process, and returns when it has succeeded.

    `settings` include the MLflow run of the pipeline. So a restarted step finds its job again, and the same step of
    another pipeline run has another job.
    """
    cluster, deadline_s = Cluster(namespace), int(deadline_hours * 3600)
    launch = Launch(
        command=("train", config, *settings), nodes=nodes, processes=processes, image=image, deadline_s=deadline_s
    )
    job = render_job(launch, cluster.pod_template(POD_TEMPLATE), cluster.namespace)
    run_job(cluster, job, Limits(deadline_s=deadline_s))


def run_job(cluster: Cluster, manifests: list[Manifest], limits: Limits) -> None:
    """Returns when the job has succeeded. Raises JobFailedError, or JobAbandonedError if it exceeds a limit.

    On SIGTERM or Ctrl-C the job is deleted, which saves a checkpoint. A job that exceeds a limit is suspended and kept,
    so that a restarted step does not start it again.
    """
    kind, name, job = manifests[-1]["kind"], manifests[-1]["metadata"]["name"], None
    with termination_as_exception():
        try:
            job = ensure_job(cluster, manifests)
            follow_job(cluster, kind, name, limits)
        except JobAbandonedError as error:
            _stop(cluster, kind, name, str(error))
            raise
        except (TerminationRequested, KeyboardInterrupt) as error:
            job = job or cluster.get(kind, name)  # the response to its creation may have been lost
            if job and _digest_of(job) == manifest_digest(manifests):
                cluster.delete(kind, name, job["metadata"]["uid"])
                log.warning("%s was removed", name)
            if isinstance(error, TerminationRequested):
                raise SystemExit(TERMINATED) from None
            raise


def _stop(cluster: Cluster, kind: str, name: str, reason: str) -> None:
    """Suspends the job and records the reason, so that `ensure_job` does not resume it.

    Kueue resumes a suspended job while its Workload is active, so with Kueue the Workload is deactivated instead.
    """
    job = cluster.get(kind, name)
    if not job:
        return
    spec: Manifest = {}
    if not _deactivated(cluster, job):
        spec = {"runPolicy": {"suspend": True}} if kind == "PyTorchJob" else {"suspend": True}
    cluster.patch(kind, name, {"metadata": {"annotations": {ABANDONED: reason[:1000]}}, "spec": spec})


def _deactivated(cluster: Cluster, job: Manifest) -> bool:
    """Whether the job had a Workload, which is now deactivated."""
    if QUEUE_LABEL not in (job["metadata"].get("labels") or {}):
        return False
    try:
        workloads = cluster.labelled("Workload", f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}")
        for workload in workloads:
            cluster.patch("Workload", workload["metadata"]["name"], {"spec": {"active": False}})
    except ClusterError as error:  # no Kueue, or no permission for its Workloads
        log.warning("the Workload of %s cannot be deactivated: %s", job["metadata"]["name"], error)
        return False
    return bool(workloads)


def find_kind(cluster: Cluster, name: str) -> str:
    """The kind of the job with this name. Raises ConfigError if there is none."""
    for kind in KINDS:
        try:
            if KINDS[kind].succeeded and cluster.get(kind, name):
                return kind
        except ClusterError as error:  # this kind is not installed or not readable
            log.debug("%s: %s", kind, error)
    raise ConfigError(
        f"namespace {cluster.namespace} has no job named {name}. `kubectl get pytorchjobs,jobs` lists them."
    )


def manifest_digest(manifests: list[Manifest]) -> str:
    return hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(job: Manifest) -> str:
    return str(job["metadata"].get("annotations", {}).get(DIGEST, ""))


def ensure_job(cluster: Cluster, manifests: list[Manifest]) -> Manifest:
    """Creates the job, or adopts an existing one of the same name that has not failed."""
    owner, run_id = cluster.owner(), os.environ.get(RUN_ID, "")
    for manifest in manifests:
        manifest = copy.deepcopy(manifest)
        manifest["metadata"]["annotations"] = {DIGEST: manifest_digest(manifests)}
        manifest["metadata"]["ownerReferences"] = owner
        if run_id:
            manifest["metadata"]["labels"] = {**manifest["metadata"]["labels"], RUN_LABEL: run_id}
            for _, pod in rules.pods(manifest):  # its run in MLflow is nested under that of the pipeline
                find_container(dict(pod)).setdefault("env", []).append({"name": RUN_ID, "value": run_id})
        job = _ensure_one(cluster, manifest)
    return job


def _ensure_one(cluster: Cluster, manifest: Manifest) -> Manifest:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    while True:
        try:
            job = cluster.create(manifest)
        except ClusterError as error:
            if error.status != 409:
                raise
        else:
            log.info("%s %s was created", kind, name)
            return job
        found = cluster.get(kind, name)
        if found is None:  # deleted in the meantime
            continue
        if found["metadata"].get("deletionTimestamp"):
            _wait_until_gone(cluster, kind, name)
        elif failed := find_condition(found, "Failed"):
            log.warning("%s %s failed earlier and is replaced: %s", kind, name, failed.get("message"))
            cluster.delete(kind, name, found["metadata"]["uid"])
            _wait_until_gone(cluster, kind, name)
        elif _digest_of(found) != _digest_of(manifest):
            raise ConfigError(
                f"a {kind} named {name} exists with other settings. Remove it with `mplug job cancel {name}`, or "
                "choose another --name."
            )
        elif reason := found["metadata"]["annotations"].get(ABANDONED):
            raise AttemptsError(f"{reason} Remove it with `mplug job cancel {name}` to start again.")
        else:
            log.info("%s %s exists and is followed", kind, name)
            metadata = {key: manifest["metadata"][key] for key in ("ownerReferences", "labels")}
            if metadata["ownerReferences"] or RUN_LABEL in metadata["labels"]:
                # the job no longer depends on the older run and its workflow
                cluster.patch(kind, name, {"metadata": {key: value for key, value in metadata.items() if value}})
            return found


def _wait_until_gone(cluster: Cluster, kind: str, name: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while cluster.get(kind, name):
        if time.monotonic() > deadline:
            raise OutageError(f"{kind} {name} was not removed within {GONE_WITHIN_S:g} s; see `kubectl get pods`.")
        time.sleep(0.5)


def follow_job(cluster: Cluster, kind: str, name: str, limits: Limits) -> None:
    """Returns when the job has succeeded. Shows its log and its events until then."""
    seen = JobHistory()
    with show_log(cluster, kind, name, seen.resumed):
        while True:
            job = cluster.get(kind, name)
            if job is None:
                raise JobFailedError(f"{kind} {name} was deleted while it was followed.")
            if _is_done(cluster, kind, job, seen):
                return
            _enforce_limits(cluster, kind, job, seen, limits)
            for changed in cluster.changes(kind, name, job["metadata"]["resourceVersion"], _patience(job, limits)):
                if changed is None or _is_done(cluster, kind, changed, seen):
                    break
                _enforce_limits(cluster, kind, changed, seen, limits)


class TerminationRequested(BaseException):
    pass


def _is_done(cluster: Cluster, kind: str, job: Manifest, seen: JobHistory) -> bool:
    """Whether the job has succeeded. Raises JobFailedError if it has failed."""
    for item in (job.get("status") or {}).get("conditions") or []:
        if item["status"] == "True" and item["type"] not in seen.conditions:
            seen.conditions.add(item["type"])
            log.info("%s: %s", job["metadata"]["name"], item["type"])
    if failed := find_condition(job, "Failed"):
        name = job["metadata"]["name"]
        pods = cluster.pods(kind, name)
        reason = failed.get("message") or failed.get("reason")
        # without a permanent code the restarts of the pod were used up
        code = next((code for code in pod_exit_codes(pods) if not is_restartable(code)), FAILED)
        ended = termination_reasons(pods)
        known = [why for why in seen.end_reasons.values() if OOM_KILLED in why and why not in ended]
        raise JobFailedError(" ".join([f"{kind} {name} has failed: {reason} {ended}", *known[-1:]]), code)
    return bool(find_condition(job, KINDS[kind].succeeded))


def _enforce_limits(cluster: Cluster, kind: str, job: Manifest, seen: JobHistory, limits: Limits) -> None:
    """Reports what the conditions of a job do not: pods that wait, restarts. Raises JobAbandonedError above a limit."""
    name = job["metadata"]["name"]
    pods = cluster.pods(kind, name)
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
        seen.note(pod)
    if seen.replaced and time.monotonic() - min(seen.replaced.values()) > RESUMES_WITHIN_S:
        seen.report("Training has not resumed yet.")
    complaints = {*cluster.warnings(name), *(line for pod in pods for line in waiting_reasons(pod))}
    for complaint in complaints - seen.warnings:
        seen.warnings.add(complaint)
        log.warning("%s: %s", name, complaint)
    if seen.restarts > limits.restarts:
        raise JobAbandonedError(
            f"{kind} {name} was suspended: a pod was restarted {seen.restarts} times, at most {limits.restarts} are "
            f"allowed. {termination_reasons(pods)}"
        )
    if limits.deadline_s and _age_s(job) > limits.deadline_s:
        raise JobAbandonedError(f"{kind} {name} was suspended: it did not finish within {limits.deadline_s:g} s.")


def _patience(job: Manifest, limits: Limits) -> int:
    """Seconds until the next check."""
    left = limits.deadline_s - _age_s(job) if limits.deadline_s else CHECK_EVERY_S
    return max(1, int(min(CHECK_EVERY_S, left)))


def _age_s(job: Manifest) -> float:
    """Seconds since the start of the job. Time in a queue does not count."""
    if job["spec"].get("suspend") or job["spec"].get("runPolicy", {}).get("suspend"):
        return 0.0
    started = (job.get("status") or {}).get("startTime") or job["metadata"]["creationTimestamp"]
    return time.time() - parse_time(started)


def follow_log(cluster: Cluster, kind: str, name: str) -> None:
    """Prints the log until the job has ended."""
    with show_log(cluster, kind, name, lambda _line: None):
        while job := cluster.get(kind, name):
            if find_condition(job, "Failed") or find_condition(job, KINDS[kind].succeeded):
                return
            time.sleep(2)


@contextmanager
def termination_as_exception() -> Iterator[None]:
    """Raises TerminationRequested in the block on the first SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("asked to end", file=sys.stderr, flush=True)
        raise TerminationRequested

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
