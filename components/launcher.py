"""Starts the processes of a training run, with torchrun on this machine. No kfp here."""

import logging
import os
import sys


def launch(config: str, overrides: list[str], processes: int) -> int:
    """Trains on `processes` processes of this machine; returns 0, or the exit code of the first that failed."""
    # seconds of imports, and only here: the command line stays quick
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # where DeepSpeed has to guess its device, it says so on standard output, which is the model's URI alone
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # restarted workers must not meet the addresses of the last attempt (torch 2.13 shares one store between attempts)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failed process has said why
    torchrun = ["--standalone", f"--nproc-per-node={processes}", "-m", "model.training"]
    try:
        run(parse_args([*torchrun, config, *overrides]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        print(f"training process {first.local_rank} ended with exit code {first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # killed by a signal: 128 + its number
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
