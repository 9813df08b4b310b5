"""Makes the fork server of loader processes leave its process group when it imports this module, which it does first.

torchrun sends SIGTERM to the whole process group of a training process. Loader processes must outlive it until the
training process has saved.
"""

import os
import signal

from model.parent import signal_when_parent_ends

os.setpgid(0, 0)
# loader processes keep open the pipe whose end stops the server, and only check whether the server is alive
signal_when_parent_ends(signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
