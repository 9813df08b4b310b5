"""The log of a job across broken connections and replaced pods."""

import threading
from typing import Any

import pytest

from components.jobs.client import Cluster
from components.jobs.launcher import ensure_job, follow_log, run_job
from components.jobs.log import print_log
from tests.helpers.fake_kube import FakeKube
from tests.helpers.jobs import LIMITS, MASTER, started, succeed, wait_until


def test_a_job_is_created_and_followed_with_its_log(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        kube.pod("job-master-0", MASTER)
        kube.log("job-master-0", "step 1", "step 2")
        wait_until(lambda: kube.sent_lines == ["step 1", "step 2"])
        kube.log("job-master-0", "step 3")
        kube.conclude("pytorchjobs", "job", "Succeeded")
        kube.pod("job-master-0", MASTER, phase="Succeeded")

    started(act)
    run_job(cluster, job, LIMITS)
    assert capsys.readouterr().out.split("\n")[:-1] == ["step 1", "step 2", "step 3"]
    created = kube.objects["mplug", "pytorchjobs", "job"]
    assert created["spec"] == job[-1]["spec"]


def test_a_log_survives_broken_connections_and_new_pods(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = iter([None, 500, 500])
    kube.faults.append(lambda _method, path: next(broken, None) if path.endswith("/log") else None)

    def act() -> None:
        kube.wait_for("pytorchjobs")
        kube.pod("job-master-0", MASTER)
        kube.log("job-master-0", "step 1")
        wait_until(lambda: kube.sent_lines == ["step 1"])
        kube.logs["job-master-0"] = []
        kube.remove("pods", "job-master-0")
        kube.pod("job-master-0", MASTER)
        kube.log("job-master-0", "step 1 again")
        wait_until(lambda: kube.sent_lines == ["step 1", "step 1 again"])
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
    assert capsys.readouterr().out.split("\n")[:-1] == ["step 1", "step 1 again"]


def test_kubelet_errors_are_not_shown_as_log(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_job(cluster, job)
    kube.pod("job-master-0", MASTER, phase="Succeeded")
    kube.log("job-master-0", "step 1")
    kube.kubelet_says = "unable to retrieve container logs for containerd://6a5f"
    print_log(cluster, "PyTorchJob", "job", {}, follow=False)
    assert capsys.readouterr().out == "step 1\n"


def test_the_logs_of_several_pods_are_shown_once(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_job(cluster, job)
    for number in range(2):
        kube.pod(f"job-{number}", MASTER, phase="Failed")
        kube.log(f"job-{number}", f"of pod {number}")
    threading.Timer(2.5, kube.conclude, ("pytorchjobs", "job", "Failed")).start()
    follow_log(cluster, "PyTorchJob", "job")
    assert sorted(capsys.readouterr().out.split()) == sorted(["of", "pod", "0", "of", "pod", "1"])
