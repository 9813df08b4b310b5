"""How a process of a run learns that the one that started it is gone. Imports nothing: a fork server reads it first."""

import ctypes

PARENT_PID = "MPLUG_PARENT_PID"
"""Variable in which a process of the launcher tells those that it starts whose end is theirs."""
PR_SET_PDEATHSIG = 1


def signal_at_its_end(number: int) -> None:
    """This process is sent the signal `number` when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
