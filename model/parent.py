"""Ends a process when its parent ends. Imports nothing of the project: the fork server loads it first."""

import ctypes

PARENT_PID = "MPLUG_PARENT_PID"
"""Variable with the process ID of the parent whose end also ends this process."""
PR_SET_PDEATHSIG = 1


def signal_when_parent_ends(number: int) -> None:
    """Asks the kernel to send this process the signal `number` when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
