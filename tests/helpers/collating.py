"""A collate function that loader processes can import."""

import torch

from model.data.loader import Batch, Example


def collate(examples: list[Example]) -> Batch:
    return {
        "videos": [item.annotation.video for item in examples],
        "clips": torch.stack([item.clip for item in examples]),
        "seeds": [item.seed for item in examples],
    }
