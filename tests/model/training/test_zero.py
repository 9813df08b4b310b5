"""The private attributes of DeepSpeed that checkpoints need; test_engine.py checks that this version has them."""

import pytest
from torch import nn

from model.errors import StageError
from model.training.zero import trained_state


def test_a_missing_attribute_is_named() -> None:
    class Optimizer:
        bit16_groups = optimizer = update_lp_params = None

    with pytest.raises(StageError, match=r"has no Optimizer\.single_partition_of_fp32_groups, Parameter\._hp_mapping"):
        trained_state(nn.Linear(2, 2), Optimizer(), 1, 0)
