"""The private attributes of DeepSpeed that checkpoints need."""

import pytest
from torch import nn

from model.errors import StageError
from model.tasks.build import build_task
from model.training.distributed import Processes
from model.training.engine import Engine
from model.training.zero import missing_attributes, trained_state
from tests.helpers.running import pretraining_config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_has_every_attribute(stage: int, precision: str, decoder: str, group: Processes) -> None:
    config = pretraining_config(decoder, f"training.zero_stage={stage}", f"training.precision={precision}")
    engine = Engine(build_task(config).network, config, group)
    trained = [parameter for parameter in engine.engine.module.parameters() if parameter.requires_grad]
    assert {name for parameter in trained for name in missing_attributes(engine.optimizer, stage, parameter)} == set()


def test_an_attribute_that_is_gone_is_named() -> None:
    class Optimizer:
        bit16_groups = optimizer = update_lp_params = None

    with pytest.raises(StageError, match=r"has no Optimizer\.single_partition_of_fp32_groups, Parameter\._hp_mapping"):
        trained_state(nn.Linear(2, 2), Optimizer(), 1, 0)
