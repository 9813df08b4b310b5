"""Messages about pods of a job: why they wait, which were replaced, incomplete statuses."""

import time
from typing import Any

import pytest

from components.jobs.client import Cluster
from components.jobs.launcher import run_job
from tests.helpers.fake_kube import FakeKube
from tests.helpers.jobs import LIMITS, MASTER, started, succeed, wait_for_a_check


def test_reasons_of_waiting_pods_are_shown(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        unplaced = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
        kube.pod("job-master-0", MASTER, phase="Pending", conditions=[unplaced])
        kube.put(
            "events",
            {
                "metadata": {"name": "e"},
                "involvedObject": {"name": "job"},
                "type": "Warning",
                "reason": "FailedCreatePod",
                "message": "violates PodSecurity: init-pytorch must not run as root",
            },
        )
        wait_for_a_check(kube)
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
    assert "Insufficient nvidia.com/gpu" in caplog.text
    assert "FailedCreatePod: violates PodSecurity" in caplog.text


def test_a_replaced_pod_is_one_line_with_reason_and_step(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    worker = {**MASTER, "training.kubeflow.org/replica-type": "worker"}

    def act() -> None:
        kube.wait_for("pytorchjobs")
        kube.pod("job-master-0", MASTER)
        ended = {"name": "pytorch", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        kube.pod("job-worker-0", worker, phase="Failed", containerStatuses=[ended])
        kube.conclude("pytorchjobs", "job", "Restarting")
        wait_for_a_check(kube)
        kube.remove("pods", "job-worker-0")
        kube.pod("job-worker-0", worker)
        wait_for_a_check(kube)
        kube.log("job-master-0", "training resumes from step 30")
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
    (line,) = [record.message for record in caplog.records if "worker-0" in record.message]
    assert line == (
        "pod job-worker-0 was replaced: it was OOM-killed at the pod's limit of its node: raise it in "
        "PodTemplate training. Training resumes from step 30."
    )


def test_a_pod_stuck_in_an_init_container_is_reported(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        for name, minutes in (("job-worker-0", 4), ("job-worker-1", 0)):
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 60 * minutes))
            initial = {"name": "init-pytorch", "state": {"running": {"startedAt": since}}}
            kube.pod(name, MASTER, phase="Pending", initContainerStatuses=[initial])
        wait_for_a_check(kube)
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
    assert "pod job-worker-0 stays in init container init-pytorch" in caplog.text
    assert "job-worker-1" not in caplog.text


def test_pods_with_incomplete_status_are_tolerated(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        kube.put("pods", {"metadata": {"name": "a", "labels": MASTER}})
        kube.pod("b", MASTER, phase="Pending", containerStatuses=[{"name": "pytorch"}], initContainerStatuses=[{}])
        moment = {"startedAt": "2026-01-01T00:00:00.123456+00:00"}
        kube.pod("c", MASTER, phase="Pending", initContainerStatuses=[{"name": "i", "state": {"running": moment}}])
        wait_for_a_check(kube)
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
