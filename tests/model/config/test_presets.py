"""The published configurations in full size on the meta device."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from model.config.load import load_config
from model.mplug_video import MPlugVideoConfig, MPlugVideoForConditionalGeneration
from model.mplug_video.configuration import TimeSformerConfig

DECODERS = {"pretrain_1.3b": 1_317_654_528, "pretrain_2.7b": 2_653_967_360}
PROJECTIONS = {"pretrain_1.3b": 1_574_912, "pretrain_2.7b": 1_968_640}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", DECODERS)
def test_parameter_counts_match_the_publication(preset: str) -> None:
    settings = load_config(preset, ["data.shards=s", "model.decoder=d"]).model
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
