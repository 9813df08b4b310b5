"""Two real processes, one of which hangs, dies or fails: both end in time and with the same code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cli.services import free_ports
from model.parent import PARENT_PID

LOST, DATA, FAILED, KILLED = 144, 3, 1, -signal.SIGKILL


def run(case: str, **variables: str) -> tuple[list[int | None], list[str], float]:
    """Exit codes (None: it had to be killed), standard errors, seconds."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1))}
    common |= variables
    start = time.monotonic()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.watched", case],
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    codes: list[int | None] = []
    errors = []
    stopped = int(case[0]) if case.endswith(("stops", "hangs")) else None
    for rank in sorted(range(2), key=lambda rank: rank == stopped):
        if rank == stopped:  # like torchrun with a process that does not respond
            children[rank].kill()
        errors.append(children[rank].communicate(timeout=60)[1])
        codes.append(None if rank == stopped else children[rank].returncode)
    return codes, errors, time.monotonic() - start


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missed_deadline_ends_all_processes_with_stacks(rank: int) -> None:
    codes, errors, seconds = run(f"{rank}-sleeps")
    assert codes == [LOST, LOST]
    assert seconds < 30
    assert any("s in step (watchdog.step_s)" in text for text in errors)
    assert "time.sleep(100)" in errors[rank]
    assert "group.any(False)" in errors[1 - rank]
    assert all("MainThread:" in text and "on exit" in text for text in errors)


@pytest.mark.parametrize(("rank", "case"), [(0, "stops"), (1, "stops"), (0, "hangs")])
def test_a_process_without_heartbeat_ends_the_run(rank: int, case: str) -> None:
    codes, errors, seconds = run(f"{rank}-{case}")
    assert codes == [LOST, None]
    assert seconds < 30
    assert ("has sent no heartbeat for 4 s" if rank else "process 0 has not answered for 4 s") in errors[0]


def test_processes_end_if_the_launcher_died_early() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    codes, errors, seconds = run("0-sleeps", **{PARENT_PID: gone.stdout.strip()})
    assert codes == [LOST, LOST]
    assert seconds < 30
    assert any("the launcher of process" in text for text in errors)


@pytest.mark.parametrize(("rank", "case", "code"), [(1, "fails", DATA), (0, "breaks", FAILED)])
def test_an_error_of_one_process_is_the_exit_code_of_all(rank: int, case: str, code: int) -> None:
    codes, errors, _ = run(f"{rank}-{case}")
    assert codes == [code, code]
    assert ("error: no clip can be read" if case == "fails" else "ZeroDivisionError: a bug") in errors[rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_a_watchdog_thread_is_a_bug(rank: int) -> None:
    codes, errors, _ = run(f"{rank}-unwatched")
    assert codes == [FAILED, FAILED]
    assert f"the thread watchdog of process {rank} has failed" in errors[rank]
    assert f"error: process {rank}, watchdog: AttributeError" in errors[1 - rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_restartable(rank: int) -> None:
    codes, errors, seconds = run(f"{rank}-dies")
    assert codes[rank] == KILLED
    assert codes[1 - rank] == LOST
    assert seconds < 20
    assert "a process of the run is gone" in errors[1 - rank]
    assert "Traceback" not in errors[1 - rank]
