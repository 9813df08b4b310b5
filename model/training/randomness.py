"""All randomness of a step follows from (seed, step, process): a restarted run draws what it would have drawn."""

import hashlib

import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch on all devices, for dropout."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
