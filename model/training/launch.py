"""Starts the processes of a training run on this machine, which may be one of several nodes. Knows no Kubernetes.

On a single machine torchrun runs in standalone mode. In a pod of a PyTorchJob, the operator's variables describe the
other nodes: PET_NNODES and, with a Master, PET_MASTER_ADDR, PET_MASTER_PORT and PET_NODE_RANK; in an elastic job
PET_RDZV_ENDPOINT. (The operator's RANK and WORLD_SIZE count nodes; torchrun overwrites them.) All nodes join torchrun's
c10d store on the first node.

Each attempt is a separate process (`python -m model.training.launch`), so that a failed attempt leaves nothing behind.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time

from model import restart_policy as policy
from model.config.load import load_config
from model.config.schema import RunConfig
from model.errors import FAILURES, INTERRUPTED, LOST, UserError, clear_termination, exit_code, note_termination
from model.memory_limit import kill_before_this, memory_kills, memory_limit
from model.parent import PARENT_PID, signal_when_parent_ends
from model.retry import exponential_s
from model.startup import quick_imports
from model.training.attempts import count_start

FIRST_NODE_WITHIN_S = 1800.0
ALL_NODES_WITHIN_S = 14000
"""Timeout for all nodes to join. Pods may be pending for hours; torchrun's default of ten minutes would use up the
attempts of a run. The liveness probe of the pods allows four hours."""
SHUTDOWN_S = 60
"""Time for processes to save a checkpoint after SIGTERM."""


def launch(config: str, overrides: list[str], processes: int | None = None) -> int:
    """Trains on `processes` processes of this machine and returns the exit code.

    An attempt that ends with a restartable code is started again and resumes from its last checkpoint.
    """
    command = _command("model.training", [config, *overrides], processes)
    failed, resolved, cause = 0, load_config(config, overrides), ""
    while True:
        start, kills = time.monotonic(), memory_kills()
        clear_termination()
        code, asked_to_end = _counted(resolved, cause) or _attempt(command)
        failed = 0 if time.monotonic() - start > policy.FAST_FAILURE_S else failed + 1
        is_restartable = policy.is_restartable(code)
        if is_restartable and memory_kills() > kills:
            cause = _killed_for_memory()
            _report(code, cause)
        if not is_restartable or code == INTERRUPTED or asked_to_end or failed == policy.MAX_FAST_FAILURES:
            return code
        wait_s = exponential_s(max(failed, 1), policy.FIRST_WAIT_S, policy.LONGEST_WAIT_S)
        print(f"training ended with code {code}, restarting in {wait_s:g} s", file=sys.stderr, flush=True)
        time.sleep(wait_s)


def run_together(module: str, arguments: list[str], processes: int | None = None) -> int:
    """Runs a module on `processes` processes of this machine, with those of other nodes, and returns the exit code."""
    return _attempt(_command(module, arguments, processes))[0]


def _command(module: str, arguments: list[str], processes: int | None) -> list[str]:
    count = ["--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, "-m", "model.training.launch", *count, "-m", module, *arguments]


def _counted(config: RunConfig, cause: str) -> tuple[int, bool] | None:
    """Counts this start on the first node. Returns the result of a failed attempt if the bucket does not answer."""
    if not _is_first_node():
        return None
    try:
        count_start(config, cause)
    except UserError as error:
        if not policy.is_restartable(code := exit_code(error)):
            raise
        _report(code, str(error))
        return code, False
    return None


def _killed_for_memory() -> str:
    limit = memory_limit()
    if not limit:
        return "a process was killed for lack of memory: this machine has too little."
    return f"a process was OOM-killed at the pod's limit of {limit / 2**20:.0f} MiB: raise it in PodTemplate training."


def _report(code: int, why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
    note_termination(code, why)


def _attempt(command: list[str]) -> tuple[int, bool]:
    """Exit code of one attempt, and whether this process was asked to end."""
    asked: list[int] = []
    environment = {**os.environ, PARENT_PID: str(os.getpid())}
    environment.pop(FAILURES, None)  # a failed attempt is not a failure of the step
    child = subprocess.Popen(command, env=environment)
    kill_before_this(child.pid)  # this process must survive to restart and to report

    def pass_on(number: int, _frame: object) -> None:
        asked.append(number)
        child.send_signal(number)

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        return _shell_code(child.wait()), bool(asked)
    except KeyboardInterrupt:  # the terminal also sends SIGINT to the child
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _shell_code(exit_code: int) -> int:
    """128 + signal number for a process that was ended by a signal."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def main() -> None:
    """One attempt on this node."""
    signal_when_parent_ends(signal.SIGTERM)
    if os.environ.get(PARENT_PID, str(os.getppid())) != str(os.getppid()):
        sys.exit(LOST)  # the parent ended before this process could ask for the signal
    os.environ[PARENT_PID] = str(os.getpid())
    with quick_imports():
        import torch.distributed.run  # noqa: F401
    _environment()
    sys.exit(_torchrun([*_place(), *sys.argv[1:]]))


def _environment() -> None:
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # without it, DeepSpeed prints the detected device to standard output, which is for the URI of the model
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # torch 2.13 shares one store between attempts: restarted workers would find the addresses of the last attempt
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.pop("PET_STANDALONE", None)  # the operator sets it to an empty value, which torchrun rejects
    wanted = os.environ.get("PET_NPROC_PER_NODE", "auto")
    if not wanted.isdigit():  # without a GPU, torchrun's "auto" is one process per core
        os.environ["PET_NPROC_PER_NODE"] = str(max(torch.cuda.device_count(), 1))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failed process reports the reason


def _place() -> list[str]:
    """torchrun's arguments for the rendezvous. Waits until the first node is reachable."""
    common = [f"--max-restarts={policy.TORCHRUN_RESTARTS}", f"--shutdown-timeout={SHUTDOWN_S}"]
    if "PET_NNODES" not in os.environ:
        return ["--standalone", *common]
    endpoint = _endpoint()
    host, _, port = endpoint.rpartition(":")
    is_first = _is_first_node()
    os.environ.pop("PET_NODE_RANK", None)
    if not is_first:
        _wait_for(host, int(port))
    given = os.environ.get("PET_RDZV_CONF", "")
    waiting = "" if "join_timeout" in given else f"join_timeout={ALL_NODES_WITHIN_S}"
    conf = ",".join(filter(None, [given, waiting, f"is_host={int(is_first)}"]))
    name = os.environ.get("PET_RDZV_ID", "mplug")
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}", f"--rdzv-conf={conf}", *common]


def _endpoint() -> str:
    """Rendezvous endpoint, as host:port."""
    static = f"{os.environ.get('PET_MASTER_ADDR')}:{os.environ.get('PET_MASTER_PORT')}"
    return os.environ.get("PET_RDZV_ENDPOINT", static)


def _is_first_node() -> bool:
    """Whether this node hosts the rendezvous. True if there are no other nodes."""
    if "PET_NNODES" not in os.environ or os.environ.get("PET_NODE_RANK") == "0":
        return True
    return _endpoint().partition(":")[0].partition(".")[0] == socket.gethostname()


def _wait_for(host: str, port: int) -> None:
    """Waits for the port: the name of a pod resolves before anything listens there."""
    end, reported = time.monotonic() + FIRST_NODE_WITHIN_S, 0.0
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                print(f"error: {host}:{port} has not answered for {FIRST_NODE_WITHIN_S:g} s: {error}", file=sys.stderr)
                sys.exit(LOST)
            if time.monotonic() - reported > 30:
                print(f"waiting for the first node, {host}:{port}: {error}", file=sys.stderr, flush=True)
                reported = time.monotonic()
            time.sleep(0.5)


def _torchrun(arguments: list[str]) -> int:
    """Runs torchrun and returns the exit code of the processes on this node."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        # a permanent code is the cause; processes that only lost a peer have a transient one
        ends = [(_shell_code(failure.exitcode), failure.timestamp, rank) for rank, failure in error.failures.items()]
        code, _, rank = min(ends, key=lambda end: (policy.is_restartable(end[0]), end[1:]))
        print(f"process {rank} ended with exit code {code}", file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return INTERRUPTED if error.sigval == signal.SIGINT else 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        print(f"the nodes of the run lost contact: {error or type(error).__name__}", file=sys.stderr, flush=True)
        return LOST
    return 0


if __name__ == "__main__":
    main()
