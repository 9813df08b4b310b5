import json
from pathlib import Path

import pytest
import torch
from torch import nn

from model.config import OptimConfig
from model.training.optim import lr_at, parameter_groups

GOLDEN = json.loads((Path(__file__).parents[2] / "fixtures" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_schedule_is_upstreams(name: str) -> None:
    case = GOLDEN[name]
    config = OptimConfig(lr=case["base_value"], min_lr=case["final_value"], warmup_steps=case["warmup_steps"])
    for step, expected in case["values"].items():
        assert lr_at(int(step), case["total"], config) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_vectors_biases_and_position_embeddings_do_not_decay_and_clip_weights_move_slowly() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 2, 3))
            self.attn = nn.Linear(3, 3)
            self.temporal_fc = nn.Linear(3, 3)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_encoder = Encoder()
            self.queries = nn.Parameter(torch.zeros(1, 2, 3))
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    network = Network()
    found = {}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in parameter_groups(network, OptimConfig(lr=1.0, weight_decay=0.05, vision_lr_scale=0.1)):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["weight_decay"], group["lr"])
    assert found == {
        "vision_encoder.pos_embed": (0.0, 0.1),
        "vision_encoder.attn.weight": (0.05, 0.1),
        "vision_encoder.attn.bias": (0.0, 0.1),
        "vision_encoder.temporal_fc.weight": (0.05, 1.0),
        "vision_encoder.temporal_fc.bias": (0.0, 1.0),
        "queries": (0.05, 1.0),
    }
