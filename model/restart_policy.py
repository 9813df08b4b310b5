"""Who restarts a run, how often, and why. docs/training.md has the table.

Every layer reads its limit here: `mplug train`, torchrun, the run's own count in its checkpoint folder, the operators'
jobs, the launcher that follows a job, and pipelines.
"""

from model.errors import ATTEMPTS, CONFIGURATION, DATA, FAILED

PERMANENT = [FAILED, CONFIGURATION, DATA, ATTEMPTS]
"""Exit codes of ours that end a Job at once. The API wants a list; the PyTorchJob's policy knows 1 to 127 by itself."""
MAX_ATTEMPTS = 10
"""Starts of a run without a new checkpoint, over all layers; the default of checkpoint.max_attempts. The one limit that
a lost pod, a kill for memory or a new job cannot reset: it is counted in the bucket."""
MAX_FAST_FAILURES, FAST_FAILURE_S = 10, 60.0
"""`mplug train` gives up after so many attempts in a row that each ended within so many seconds: nothing then gets as
far as a first step, and a new container may help."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
"""Between its attempts; doubled while they fail fast."""
TORCHRUN_RESTARTS = 0
"""torchrun's own restarts repeat what is permanent, and each node counts them differently."""
POD_RESTART_POLICY = "ExitCode"
"""Of a PyTorchJob: 1 to 127 end it, from 128 on the operator starts the pod again, without limit."""
MAX_POD_RESTARTS = 20
"""Of any one pod of a job, after which the launcher stops it: what the operator does without end is bounded here. A
TrainJob's Job has the same limit of its own."""
JOB_RETRIES = 4
"""Of a job of one pod (evaluate, data, convert), whose commands resume by themselves."""
STEP_RETRIES = 0
"""Of a pipeline's step: Kubeflow Pipelines merges Argo's policy OnError into a retry, which repeats no exit code; with
the policy Always it repeats what is permanent as well. `mplug pipeline submit --retries` repeats what is transient."""


def is_restartable(code: int) -> bool:
    """Whether a process that ended with this code is worth a restart. A signal's code is 128 + its number."""
    return code >= 128
