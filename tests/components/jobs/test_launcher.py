"""The launcher with an API server that injects every kind of failure."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from components.jobs.client import Cluster
from components.jobs.launcher import DIGEST, Limits, ensure_job, follow_job, run_job
from components.jobs.manifests import Launch, render_job
from components.jobs.run_end import ABANDONED
from model.errors import AttemptsError, ClusterError, ConfigError, JobFailedError, OutageError, exit_code
from tests.helpers.fake_kube import FakeKube
from tests.helpers.jobs import LAUNCH, LIMITS, MASTER, started, succeed, wait_for_a_check, wait_until
from tests.helpers.pod_templates import CPU


def test_equal_jobs_have_equal_names() -> None:
    def name(**changes: Any) -> str:
        return render_job(Launch(**{"command": LAUNCH.command, **changes}), CPU, "mplug")[-1]["metadata"]["name"]

    assert name() == name()
    assert len({name(), name(nodes=2), name(image="registry.example/training:2"), name(processes=4)}) == 4
    assert name().startswith("train-tiny-pretraining-")


def test_a_repeated_step_adopts_the_running_job(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    uid = ensure_job(cluster, job)["metadata"]["uid"]
    kube.conclude("pytorchjobs", "job", "Running")
    started(lambda: succeed(kube))
    run_job(cluster, job, LIMITS)
    assert kube.objects["mplug", "pytorchjobs", "job"]["metadata"]["uid"] == uid
    run_job(cluster, job, LIMITS)  # a job that has already succeeded is an immediate success


def test_a_repeated_step_replaces_a_failed_job(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    uid = ensure_job(cluster, job)["metadata"]["uid"]
    kube.conclude("pytorchjobs", "job", "Failed", "a pod failed")
    kube.slow_delete_s = 1.0
    assert ensure_job(cluster, job)["metadata"]["uid"] != uid


def test_the_launcher_waits_for_a_job_that_is_being_deleted(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    uid = ensure_job(cluster, job)["metadata"]["uid"]
    kube.slow_delete_s = 1.0
    cluster.delete("PyTorchJob", "job")
    assert ensure_job(cluster, job)["metadata"]["uid"] != uid


def test_a_job_is_deleted_by_uid(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    uid = ensure_job(cluster, job)["metadata"]["uid"]
    assert not cluster.delete("PyTorchJob", "job", "of-another")
    assert cluster.delete("PyTorchJob", "job", uid)
    assert not cluster.delete("PyTorchJob", "job", uid)


def test_a_job_with_different_settings_is_not_replaced(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    ensure_job(cluster, job)
    other = copy.deepcopy(job)
    other[-1]["spec"]["nprocPerNode"] = "4"
    with pytest.raises(ConfigError, match="with other settings"):
        ensure_job(cluster, other)


def test_a_failed_job_names_pod_and_exit_code(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        ended = {"name": "pytorch", "state": {"terminated": {"exitCode": 2, "reason": "Error"}}}
        kube.pod("job-master-0", MASTER, phase="Failed", containerStatuses=[ended])
        kube.conclude("pytorchjobs", "job", "Failed", "job failed because 1 Master replica(s) failed.")

    started(act)
    with pytest.raises(JobFailedError, match=r"1 Master replica.*job-master-0: it ended with exit code 2") as caught:
        run_job(cluster, job, LIMITS)
    assert exit_code(caught.value) == 2


@pytest.mark.parametrize("code", [429, 500, 503])
def test_following_survives_failures_of_the_api_server(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], code: int
) -> None:
    answers = iter([code, code, None] * 4)
    kube.faults.append(lambda _method, _path: next(answers, None))
    started(lambda: succeed(kube))
    run_job(cluster, job, LIMITS)
    assert len([path for _, path in kube.requests if path.endswith("pytorchjobs")]) > 3


def test_following_survives_lost_watches_and_expired_versions(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    kube.break_watches = 2

    def act() -> None:
        kube.wait_for("pytorchjobs")
        wait_until(lambda: kube.break_watches == 0)
        kube.forget()
        wait_for_a_check(kube)
        succeed(kube)

    started(act)
    run_job(cluster, job, LIMITS)
    assert kube.break_watches == 0


def test_a_timeout_of_create_does_not_create_a_second_job(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    """The server has created the job, but the response was lost."""
    answered = iter([True])

    def lose_answer(method: str, path: str) -> int | None:
        if method == "POST" and next(answered, False):
            manifest = copy.deepcopy(job[-1])
            manifest["metadata"]["annotations"] = {DIGEST: expected}
            kube.put("pytorchjobs", manifest)
            return 504
        return None

    expected = ensure_job(cluster, job)["metadata"]["annotations"][DIGEST]
    kube.remove("pytorchjobs", "job")
    kube.faults.append(lose_answer)
    assert ensure_job(cluster, job)["metadata"]["name"] == "job"


def test_a_long_outage_is_restartable(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    cluster.patience_s = 0.2
    kube.faults.append(lambda _method, _path: 503)
    with pytest.raises(OutageError) as caught:
        run_job(cluster, job, LIMITS)
    assert exit_code(caught.value) >= 128


def test_missing_permission_fails_immediately_in_one_line(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    kube.faults.append(lambda method, _path: 403 if method == "POST" else None)
    with pytest.raises(ClusterError, match="Kubernetes: 403 Forbidden") as caught:
        run_job(cluster, job, LIMITS)
    assert "\n" not in str(caught.value)
    assert len(kube.requests) == 1


def test_a_job_past_its_deadline_is_suspended(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    with pytest.raises(AttemptsError, match="did not finish within 1 s") as caught:
        run_job(cluster, job, Limits(deadline_s=1))
    assert exit_code(caught.value) == 4
    assert kube.objects["mplug", "pytorchjobs", "job"]["spec"]["runPolicy"]["suspend"]
    with pytest.raises(
        AttemptsError, match=r"did not finish within 1 s.* Remove it with `mplug job cancel job` to start again"
    ):
        run_job(cluster, job, LIMITS)  # like a repeated step


def test_waiting_in_a_queue_does_not_count_towards_the_deadline(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    job[-1]["spec"]["runPolicy"]["suspend"] = True

    def act() -> None:
        kube.wait_for("pytorchjobs")
        time.sleep(2.5)
        kube.conclude("pytorchjobs", "job", "Succeeded")

    started(act)
    run_job(cluster, job, Limits(deadline_s=1))


def test_a_job_with_too_many_pod_restarts_is_suspended(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    def act() -> None:
        kube.wait_for("pytorchjobs")
        while not kube.objects["mplug", "pytorchjobs", "job"]["spec"]["runPolicy"].get("suspend"):
            kube.pod("job-master-0", MASTER)
            time.sleep(1.2)
            kube.remove("pods", "job-master-0")

    started(act)
    with pytest.raises(AttemptsError, match="restarted 3 times, at most 2"):
        run_job(cluster, job, LIMITS)
    assert kube.objects["mplug", "pytorchjobs", "job"]["spec"]["runPolicy"]["suspend"]


def test_a_job_deleted_by_someone_else_is_a_failure(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    started(lambda: (kube.wait_for("pytorchjobs"), time.sleep(0.3), kube.remove("pytorchjobs", "job")))
    with pytest.raises(JobFailedError, match="was deleted while it was followed"):
        run_job(cluster, job, LIMITS)


def test_a_job_admitted_by_kueue_is_stopped_through_its_workload(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]
) -> None:
    """Kueue resumes a job suspended by others while its Workload is active."""
    job[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    stopped = threading.Event()

    def kueue() -> None:
        metadata = kube.wait_for("pytorchjobs")[0]["metadata"]
        labels = {"kueue.x-k8s.io/job-uid": metadata["uid"]}
        kube.put("workloads", {"metadata": {"name": "pytorchjob-job-1", "labels": labels}, "spec": {"active": True}})
        while not stopped.wait(0.1):
            with kube.changed:
                is_active = kube.find("mplug", "workloads", "pytorchjob-job-1")["spec"]["active"]
                kube.find("mplug", "pytorchjobs", "job")["spec"]["runPolicy"]["suspend"] = not is_active

    watcher = started(kueue)
    with pytest.raises(AttemptsError, match="did not finish within 1 s"):
        run_job(cluster, job, Limits(deadline_s=1))
    time.sleep(0.5)
    stopped.set()
    watcher.join()
    stopped_job = kube.objects["mplug", "pytorchjobs", "job"]
    assert stopped_job["spec"]["runPolicy"]["suspend"]
    assert "did not finish" in stopped_job["metadata"]["annotations"][ABANDONED]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_job_with_a_queue_but_without_kueue_is_suspended(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], is_there: bool
) -> None:
    """Kueue is not installed, or does not manage PyTorchJobs, as in its default configuration."""
    job[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    kube.faults.append(lambda _method, path: 404 if "workloads" in path and not is_there else None)
    with pytest.raises(AttemptsError, match="did not finish within 1 s"):
        run_job(cluster, job, Limits(deadline_s=1))
    assert kube.objects["mplug", "pytorchjobs", "job"]["spec"]["runPolicy"]["suspend"]


def test_interrupted_watching_keeps_the_job(kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]]) -> None:
    ensure_job(cluster, job)
    with pytest.raises(AttemptsError):
        follow_job(cluster, "PyTorchJob", "job", Limits(deadline_s=1))
    assert kube.objects


SCRIPT = """
import sys
from components.jobs.client import Cluster
from components.jobs.launcher import Limits, run_job
from tests_shape import job
run_job(Cluster(), job(), Limits())
"""


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_step_deletes_its_job(kube: FakeKube, tmp_path: Path, asked: signal.Signals) -> None:
    launch = f"Launch(command={LAUNCH.command!r}, name='job')"
    (tmp_path / "tests_shape.py").write_text(
        "from components.jobs.manifests import Launch, render_job\n"
        f"def job(): return render_job({launch}, {CPU!r}, 'mplug')\n"
    )
    path = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], env=path, stderr=subprocess.PIPE, text=True)
    kube.wait_for("pytorchjobs", seconds=60)
    time.sleep(1)
    child.send_signal(asked)
    _, output = child.communicate(timeout=60)
    assert not kube.objects, output
    assert child.returncode == (143 if asked == signal.SIGTERM else -signal.SIGINT), output


def test_the_workflow_of_a_step_owns_its_job(
    kube: FakeKube, cluster: Cluster, job: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow = kube.put("workflows", {"metadata": {"name": "run-1"}})
    reference = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run-1", "controller": True}
    step = kube.pod("step", {})
    step["metadata"]["ownerReferences"] = [{**reference, "uid": workflow["metadata"]["uid"]}]
    (tmp_path / "namespace").write_text("mplug")
    monkeypatch.setattr("components.jobs.client.OWN_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv("KFP_POD_NAME", "step")
    (owner,) = ensure_job(cluster, job)["metadata"]["ownerReferences"]
    assert owner == {**reference, "uid": workflow["metadata"]["uid"], "controller": False, "blockOwnerDeletion": False}
    step["metadata"]["ownerReferences"][0]["uid"] = "of-the-next-run"
    ensure_job(cluster, job)  # adopts the job
    adopted = kube.objects["mplug", "pytorchjobs", "job"]
    assert adopted["metadata"]["ownerReferences"][0]["uid"] == "of-the-next-run"
