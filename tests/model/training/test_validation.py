"""Evaluation while training, and which checkpoint becomes the model."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from killing import MPLUG, Outcome
from running import TINY

from model.config import ConfigError, load
from model.evaluation.runner import evaluate
from model.tasks import build_task
from model.training.distributed import Processes
from model.training.validation import Validation


def run(root: Path, shards: dict[str, str], pretrained: str, *overrides: str, processes: int = 2) -> Outcome:
    settings = [f"model.init_from={pretrained}", f"data.shards={shards['classification']}", f"output={root}"]
    settings += [*TINY, "training.steps=12", "evaluation.every=4", "evaluation.metric=generation_top5", *overrides]
    command = [MPLUG, "train", "tiny_classification", "--processes", str(processes), "--profile", *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Outcome(ended.returncode, ended.stdout.strip(), ended.stderr)


@pytest.fixture(scope="module")
def outcome(shards: dict[str, str], pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    # ZeRO-3 is the stage in which no process has all weights to evaluate with
    found = run(tmp_path_factory.mktemp("validated"), shards, pretrained, "training.zero_stage=3")
    assert found.code == 0, found.said
    return found


def test_the_best_checkpoint_becomes_the_model(outcome: Outcome, shards: dict[str, str]) -> None:
    scores = {point["step"]: point for point in outcome.history if "val/loss" in point}
    assert sorted(scores) == [4, 8, 12]
    best = max(sorted(scores), key=lambda step: scores[step]["val/generation_top5"])
    again = evaluate(outcome.model, shards=shards["classification"], split="val", batch_size=4).scores
    assert again == pytest.approx({name: scores[best][f"val/{name}"] for name in again})


def test_a_profile_of_three_steps_is_written(outcome: Outcome) -> None:
    root = Path(outcome.model).parents[2]
    assert f"profile of 3 steps: {root}/profiles/tiny-classification.json.gz" in outcome.said
    trace = json.loads(gzip.decompress((root / "profiles" / "tiny-classification.json.gz").read_bytes()))
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])


def test_an_unknown_metric_and_a_split_that_is_too_small_are_refused(shards: dict[str, str], pretrained: str) -> None:
    settings = [f"model.init_from={pretrained}", f"data.shards={shards['classification']}", *TINY]
    for override, said in (
        ("evaluation.metric=top2", "must be one of loss, top1, top5"),
        ("evaluation.clips=3", "at least"),
    ):
        config = load("tiny_classification", [*settings, override])
        with pytest.raises(ConfigError, match=said):
            Validation(build_task(config), config, Processes(0, 1, torch.device("cpu"), dist.group.WORLD))
