"""A job and concurrent events, for tests with the API server in memory."""

import threading
import time
from collections.abc import Callable

from components.jobs.launcher import Limits
from components.jobs.manifests import Launch
from tests.helpers.fake_kube import FakeKube

LAUNCH = Launch(command=("train", "tiny_pretraining", "data.shards=s", "model.decoder=d"), name="job", nodes=2)
MASTER = {"training.kubeflow.org/job-name": "job", "training.kubeflow.org/replica-type": "master"}
LIMITS = Limits(deadline_s=60, restarts=2)


def started(act: Callable[[], None]) -> threading.Thread:
    """Runs events in the cluster at the same time."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


def wait_for_a_check(kube: FakeKube) -> None:
    """Waits until the launcher has read the pods and the events of its job after this call.

    Events are read last, so the check that ends with the second reading began after this call.
    """

    def readings() -> int:
        return sum(path.endswith("/events") for method, path in kube.requests if method == "GET")

    before = readings()
    wait_until(lambda: readings() >= before + 2)


def succeed(kube: FakeKube, name: str = "job") -> None:
    kube.wait_for("pytorchjobs")
    kube.conclude("pytorchjobs", name, "Running")
    time.sleep(0.3)
    kube.conclude("pytorchjobs", name, "Succeeded")
