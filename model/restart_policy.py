"""Restart limits of all layers, with reasons; docs/training.md shows them as a table.

The layers are torchrun, `mplug train`, the count in the checkpoint folder of a run, jobs of the operators, the launcher
that follows a job, and pipelines.
"""

from model.errors import ATTEMPTS, CONFIGURATION, DATA, FAILED

PERMANENT = [FAILED, CONFIGURATION, DATA, ATTEMPTS]
"""Exit codes that fail a Job immediately; it repeats others. The policy of a PyTorchJob covers 1 to 127."""
MAX_ATTEMPTS = 10
"""Starts of a run without a new checkpoint, over all layers; the default of checkpoint.max_attempts. They are counted
in the bucket, so a lost pod, an out-of-memory kill or a new job cannot reset the count."""
MAX_FAST_FAILURES, FAST_FAILURE_S = 10, 60.0
"""`mplug train` exits after this many consecutive attempts that each lasted less than this many seconds. Such attempts
usually end before the first step, and a new container may help."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
"""Wait between its attempts; doubled while they fail fast."""
TORCHRUN_RESTARTS = 0
"""torchrun itself would repeat permanent errors, and each node counts separately."""
POD_RESTART_POLICY = "ExitCode"
"""Of a PyTorchJob: codes 1 to 127 fail the job; for codes from 128, the operator restarts the pod without limit."""
MAX_POD_RESTARTS = 20
"""Maximum restarts of one pod of a PyTorchJob; above it, the launcher suspends the job, because the operator has no
limit. The Job of a TrainJob fails after this many failed pods of all nodes."""
JOB_RETRIES = 4
"""Maximum restarts of a job with one pod (evaluate, data, convert); these commands can be repeated."""
STEP_RETRIES = 0
"""Of a pipeline step: Kubeflow Pipelines uses Argo's policy OnError, which repeats no exit code; the policy Always
would repeat permanent errors. `mplug pipeline submit --retries` retries transient failures."""


def is_restartable(code: int) -> bool:
    """Whether a restart can help after this exit code. The code of a signal is 128 + its number."""
    return code >= 128
