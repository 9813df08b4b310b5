"""The published configurations at full size, on the meta device."""

from pathlib import Path

import pytest
import torch
from running import train
from torch import nn
from transformers import AutoConfig

from model import manifest
from model.config import load
from model.evaluation.runner import evaluate
from model.mplug_video import MPlugVideoConfig, MPlugVideoForConditionalGeneration
from model.mplug_video.configuration import TimeSformerConfig

DECODERS = {"pretrain_1.3b": 1_317_654_528, "pretrain_2.7b": 2_653_967_360}
PROJECTIONS = {"pretrain_1.3b": 1_574_912, "pretrain_2.7b": 1_968_640}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", DECODERS)
def test_parameters_are_as_many_as_published(preset: str) -> None:
    settings = load(preset, ["data.shards=s", "model.decoder=d"]).model
    text = dict(settings.text)
    config = MPlugVideoConfig(
        vision_config=TimeSformerConfig(**settings.vision.model_dump()),
        text_config=AutoConfig.for_model(text.pop("model_type"), **text),
        num_queries=settings.num_queries,
    )
    with torch.device("meta"):
        model = MPlugVideoForConditionalGeneration(config)
    assert parameters(model.vision_encoder) == 121_238_016
    queries = model.abstractor.queries.numel()
    assert queries == 98_304
    assert parameters(model.abstractor) - queries == 7_090_944
    assert parameters(model.visual_projection) == PROJECTIONS[preset]
    assert parameters(model.decoder) == DECODERS[preset]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == parameters(model) - DECODERS[preset]


SMALL = [
    "model.vision.image_size=64", "model.vision.hidden_size=128", "model.vision.num_hidden_layers=4",
    "model.vision.num_attention_heads=4", "data.workers=0", "data.max_length=48", "optim.warmup_epochs=0",
]  # fmt: skip


@pytest.mark.parametrize("preset", ["classification", "captioning", "retrieval", "retrieval_itm"])
def test_a_published_fine_tuning_runs_from_a_pretrained_model_with_other_frames(
    preset: str, shards: dict[str, str], pretrained: str, root: Path
) -> None:
    dataset = shards["retrieval" if preset == "retrieval_itm" else preset]
    uri = train(preset, root, [*SMALL, f"model.init_from={pretrained}", f"data.shards={dataset}"], steps=1)
    folder = manifest.fetch(uri)
    frames = load(preset, [f"model.init_from={uri}", f"data.shards={dataset}"]).model.vision.num_frames
    assert MPlugVideoConfig.from_pretrained(folder).vision_config.num_frames == frames
    if preset == "retrieval_itm":
        evaluation = evaluate(uri, shards=dataset)
        assert {"text_to_video_r1", "generation_video_to_text_r10"} <= evaluation.scores.keys()
