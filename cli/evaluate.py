"""`mplug evaluate`: in this process, or on several."""

import json
import os
from dataclasses import asdict

import torch

from model.distributed import Processes
from model.evaluation.__main__ import evaluate_and_print
from model.evaluation.runner import Request
from model.training.launch import run_together


def run_evaluation(request: Request, processes: int | None) -> int:
    """The exit code."""
    count = processes or max(1, torch.cuda.device_count())
    if count > 1 or "PET_NNODES" in os.environ:
        return run_together("model.evaluation", [json.dumps(asdict(request))], count)
    evaluate_and_print(request, Processes.alone())
    return 0
