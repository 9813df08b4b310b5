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


def succeed(kube: FakeKube, name: str = "job") -> None:
    kube.wait_for("pytorchjobs")
    kube.conclude("pytorchjobs", name, "Running")
    time.sleep(0.3)
    kube.conclude("pytorchjobs", name, "Succeeded")
