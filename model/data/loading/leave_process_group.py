"""For the fork server of loader processes alone, which imports this first: it leaves its process group.

torchrun asks the whole group of a training process to end; loader processes end with the one that they read for.
"""

import os
import signal

from model.parent import signal_at_its_end

os.setpgid(0, 0)
# loader processes hold the pipe by which the server would see the end, and look only for the server themselves
signal_at_its_end(signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
