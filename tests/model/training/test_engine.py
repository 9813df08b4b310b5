"""Compares DeepSpeed's ZeRO stages on two real processes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

STAGES = "0123"


@pytest.fixture(scope="module")
def found(decoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("stages") / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, "-m", "tests.helpers.engine_stages", decoder, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=300,
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_has_every_private_attribute(found: dict[str, Any], precision: str, stage: str) -> None:
    assert found[precision]["missing"][stage] == []


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-3)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_the_same_losses(found: dict[str, Any], precision: str, bound: float, stage: str) -> None:
    losses = found[precision]["losses"]
    assert len(set(losses[stage])) == len(losses[stage])
    assert losses[stage] == pytest.approx(losses["0"], rel=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_restored_engine_continues_bit_identically(found: dict[str, Any], precision: str, stage: str) -> None:
    assert found[precision]["restored"][stage] == found[precision]["then"][stage]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 2e-3)])
@pytest.mark.parametrize("stage", STAGES)
def test_state_moves_between_zero_stages(found: dict[str, Any], precision: str, bound: float, stage: str) -> None:
    assert found[precision]["from_stage_2"][stage] == pytest.approx(found[precision]["then"][stage], rel=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_step_is_skipped_on_all_processes(found: dict[str, Any], precision: str, stage: str) -> None:
    assert found[precision]["skipped"][stage]
