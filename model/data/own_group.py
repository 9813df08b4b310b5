"""For the fork server of loader processes alone, which imports this first: it leaves its process group.

torchrun asks the whole group of a training process to end; loader processes end with the one that they read for.
"""

import os
import signal

os.setpgid(0, 0)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
