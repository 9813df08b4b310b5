"""The number of threads of a process that shares its machine with others."""

import os
from decimal import Decimal


def use_threads(cpu: str) -> int:
    """Limits torch to the threads of `cpu`, a Kubernetes quantity such as "8" or "500m"; at least one. Returns them.

    By default torch uses every core of the machine, which in a pod is more than its share: two evaluations on two cores
    took 21 times as long as with one thread each.
    """
    import torch

    cores = Decimal(cpu.removesuffix("m")) / (1000 if cpu.endswith("m") else 1)
    threads = max(1, min(int(cores), len(os.sched_getaffinity(0))))
    torch.set_num_threads(threads)
    return threads
