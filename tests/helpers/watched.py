"""One of two processes with a watchdog: `watched.py CASE`, with the variables of torchrun."""

import ctypes
import os
import signal
import sys
import time

from model.config.schema import WatchdogConfig
from model.distributed import Processes, processes
from model.errors import DataError, exit_codes
from model.training.watchdog import Watchdog

LIMITS = WatchdogConfig(setup_s=60, first_step_s=60, step_s=3, checkpoint_s=60, evaluation_s=60, silence_s=4)


def act(case: str, group: Processes, watchdog: Watchdog) -> None:
    rank, _, case = case.partition("-")
    if group.rank == int(rank):
        match case:
            case "sleeps":
                time.sleep(100)
            case "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hangs":
                ctypes.PyDLL(None).sleep(100)  # the interpreter lock is never released
            case "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fails":
                raise DataError("no clip can be read")
            case "breaks":
                raise ZeroDivisionError("a bug")
            case "unwatched":
                del watchdog.config  # the thread that reads it fails
                time.sleep(100)
    group.any(False)


def main() -> None:
    with exit_codes():
        watchdog = Watchdog(LIMITS)
        watchdog.on_exit = lambda: print("on exit", file=sys.stderr, flush=True)
        with processes(LIMITS) as group, watchdog.together(group):
            watchdog.enter("checkpoint" if sys.argv[1].endswith(("stops", "hangs")) else "step")
            act(sys.argv[1], group, watchdog)


if __name__ == "__main__":
    main()
