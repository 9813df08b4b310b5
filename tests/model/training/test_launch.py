"""Two hosts with the environment of PyTorchJob pods, as network namespaces of this machine."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import MISSING, hosts, start
from tests.helpers.killing import STEPS, Outcome, Training, workers

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def settings(shards: dict[str, str], decoder: str) -> list[str]:
    return [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}", "watchdog.silence_s=8", "data.workers=1"]


def static(number: int) -> dict[str, str]:
    """Environment set by training-operator for one Master and one Worker; RANK and WORLD_SIZE count pods."""
    port, master = "23456", "job-master-0"
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "RANK": str(number),
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": port,
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(number),
        "PET_NPROC_PER_NODE": "auto",
    }


def elastic() -> dict[str, str]:
    """Environment set by training-operator for one or two elastic Workers."""
    return {
        "PYTHONUNBUFFERED": "1",
        "PET_RDZV_ENDPOINT": "job-worker-0:23456",
        "PET_RDZV_BACKEND": "c10d",
        "PET_NNODES": "1:2",
        "PET_NPROC_PER_NODE": "1",
        "PET_MAX_RESTARTS": "3",
        "PET_STANDALONE": "",
        "PET_RDZV_CONF": "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
    }


@pytest.fixture
def running() -> Iterator[list["subprocess.Popen[str]"]]:
    """Child processes, killed after the test."""
    children: list[subprocess.Popen[str]] = []
    yield children
    for child in children:
        kill(child)


def kill(child: "subprocess.Popen[str]") -> None:
    """Simulates a lost host: kills all its processes at once."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for worker in workers(child) if child.poll() is None else []:
        worker.kill()


def test_two_hosts_train_as_one_and_survive_a_killed_process(
    settings: list[str], undisturbed: Outcome, tmp_path: Path, running: list["subprocess.Popen[str]"]
) -> None:
    run = Training(tmp_path, settings)
    names = ["job-master-0", "job-worker-0"]
    with hosts(*names) as spaces:
        worker = start(spaces[1], names[1], run.command(), static(1))
        running.append(worker)
        assert worker.stderr
        assert any("waiting for the first node, job-master-0:23456" in line for line in worker.stderr)
        master = start(spaces[0], names[0], run.command(), static(0))
        running.append(master)
        run.wait_for(4, master)
        workers(worker)[0].kill()
        ended = [run.end(child) for child in running]
    assert [outcome.code for outcome in ended] == [0, 0], [outcome.stderr for outcome in ended]
    outcome = max(ended, key=lambda outcome: outcome.model)  # printed on the host of process 0
    assert outcome.losses == undisturbed.losses
    assert outcome.weights == undisturbed.weights


def test_an_elastic_run_resumes_after_losing_a_host(
    settings: list[str], undisturbed: Outcome, tmp_path: Path, running: list["subprocess.Popen[str]"]
) -> None:
    run = Training(tmp_path, settings)
    names = ["job-worker-0", "job-worker-1"]
    with hosts(*names) as spaces:
        for space, name in zip(spaces, names, strict=True):
            running.append(start(space, name, run.command(), elastic()))
        run.wait_for(4, running[0])
        for worker in workers(running[1]):
            worker.kill()
        kill(running[1])
        outcome = run.end(running[0])
    assert outcome.code == 0, outcome.stderr
    assert [point["step"] for point in outcome.history] == list(range(1, STEPS + 1))
    assert outcome.losses == pytest.approx(undisturbed.losses, rel=0.03)
