import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.config.load import load_config
from model.config.schema import OptimConfig, count_in_steps
from model.mplug_video import (
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
    MPlugVideoForRetrieval,
)
from model.training.optim import lr_at, parameter_groups
from tests.helpers.upstream import FOLDER, Recording, mapped_names

RECORDED = json.loads((FOLDER / "optimisation.json").read_text())
SCHEDULES = load_file(FOLDER / "schedules.safetensors")
MODELS = {
    "pretrain": MPlugVideoForConditionalGeneration,
    "pretrain_contrastive": MPlugVideoForPreTraining,
    "cls": MPlugVideoForClassification,
    "caption": MPlugVideoForConditionalGeneration,
    "retrieval": MPlugVideoForRetrieval,
    "retrieval_itm": MPlugVideoForClassification,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_matches_upstream(name: str) -> None:
    case = RECORDED["schedules"][name]
    settings = {
        "optim.lr": case["base_value"],
        "optim.min_lr": case["final_value"],
        "optim.warmup_steps": max(case.get("warmup_steps", 0), 0),
        "optim.warmup_epochs": max(case.get("warmup_epochs", 0), 0),
        "optim.schedule": case.get("sched_type", "cosine"),
        "training.epochs": case["epochs"],
        "training.steps": 0,
        "model.decoder": "d",
        "data.shards": "s",
        "data.batch_size": 4,
    }
    config = load_config("tiny_pretraining", [f"{key}={value}" for key, value in settings.items()])
    config = count_in_steps(config, clips=4 * case["niter_per_ep"] + 3)  # an incomplete last batch is dropped
    expected = SCHEDULES[name].tolist()
    assert config.training.steps == len(expected)
    found = [lr_at(step, len(expected), config.optim) for step in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", RECORDED["parameter_groups"])
def test_parameter_groups_match_upstream(name: str, tmp_path: Path) -> None:
    weights = name if name in MODELS else "pretrain"
    options = {"class_names": list("abcde")} if weights == "cls" else {}
    folder = Recording(weights).convert(tmp_path, **options)
    trained = {"freeze_decoder": False, "freeze_vision": True} if "unfrozen_text" in name else {}
    model = MODELS[weights].from_pretrained(folder, **trained)
    scale = 1.0 if name == "pretrain_no_backbone_scale" else 0.1
    names, ours = {id(value): key for key, value in model.named_parameters()}, mapped_names(folder)
    found = {
        (group["weight_decay"], group["lr_scale"]): {names[id(parameter)] for parameter in group["params"]}
        for group in parameter_groups(model, OptimConfig(weight_decay=0.05, vision_lr_scale=scale))
    }
    assert found == {
        (group["weight_decay"], group["lr_scale"]): {ours[parameter] for parameter in group["params"]}
        for group in RECORDED["parameter_groups"][name]
    }


def test_weight_decay_and_learning_rate_factors_by_parameter() -> None:
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
