"""Compares the analytic count of operations with torch's counter for every task."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config.load import load_config
from model.data.loading.loader import ClipSource
from model.data.shards.reader import ShardReader
from model.tasks.build import build_task
from model.training.flops import peak_flops, step_flops

CLIPS = 6


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen decoder", "trained decoder"])
@pytest.mark.parametrize(
    "task", ["pretraining", "captioning", "classification", "retrieval", "matching", "instruction"]
)
def test_the_count_matches_torch(shards: dict[str, str], decoder: str, task: str, frozen: bool) -> None:
    dataset = {"pretraining": "pretrain", "matching": "retrieval"}.get(task, task)
    preset = {"matching": "tiny_retrieval"}.get(task, f"tiny_{task}")
    settings = [f"model.decoder={decoder}", f"data.shards={shards[dataset]}", f"task={task}", "training.precision=fp32"]
    settings += (
        ["model.text={}"] if task == "instruction" else []
    )  # a trained decoder of another kind than the preset's
    config = load_config(preset, [*settings, f"model.freeze_decoder={str(frozen).lower()}"])
    built = build_task(config)
    built.model.train()
    clips = ClipSource(reader=ShardReader(f"{shards[dataset]}/train"), processor=built.processor)
    batch = built.collate([clips.example((0, position), clips.fetch(position)) for position in range(CLIPS)])
    # on CPU, the counter does not count fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        built.network(batch)[0].backward()
    ours = step_flops(built, built.vision_passes(batch), built.decoder_passes(batch)).total
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_unknown_peak_is_measured() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
