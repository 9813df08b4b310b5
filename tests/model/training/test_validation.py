"""Evaluation while training, and which checkpoint becomes the model."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from killing import MPLUG, Outcome
from running import TINY

from model.evaluation.runner import evaluate


def run(root: Path, shards: dict[str, str], pretrained: str, *overrides: str, processes: int = 2) -> Outcome:
    settings = [f"model.init_from={pretrained}", f"data.shards={shards['classification']}", f"output={root}"]
    settings += [*TINY, "training.steps=12", "evaluation.every=4", "evaluation.metric=generation_top5", *overrides]
    command = [MPLUG, "train", "tiny_classification", "--processes", str(processes), "--profile", *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Outcome(ended.returncode, ended.stdout.strip(), ended.stderr)


@pytest.fixture(scope="module")
def outcome(shards: dict[str, str], pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    found = run(tmp_path_factory.mktemp("validated"), shards, pretrained)
    assert found.code == 0, found.said
    return found


def test_the_best_checkpoint_becomes_the_model(outcome: Outcome, shards: dict[str, str]) -> None:
    scores = {point["step"]: point for point in outcome.history if "val/loss" in point}
    assert sorted(scores) == [4, 8, 12]
    best = max(sorted(scores), key=lambda step: scores[step]["val/generation_top5"])
    again = evaluate(outcome.model, shards=shards["classification"], split="val", batch_size=4).scores
    assert again == pytest.approx({name: scores[best][f"val/{name}"] for name in again})


def test_one_process_in_another_stage_validates_the_same_clips(
    outcome: Outcome, shards: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    other = run(tmp_path, shards, pretrained, "training.zero_stage=3", "training.steps=4", processes=1)
    assert other.code == 0, other.said
    first, second = (next(point for point in found.history if "val/loss" in point) for found in (outcome, other))
    # each process averages over its own tokens: equal up to the spread of title lengths
    assert first["val/loss"] == pytest.approx(second["val/loss"], rel=0.03)


def test_a_profile_of_three_steps_is_written(outcome: Outcome) -> None:
    root = Path(outcome.model).parents[2]
    assert f"profile of 3 steps: {root}/profiles/tiny-classification.json.gz" in outcome.said
    trace = json.loads(gzip.decompress((root / "profiles" / "tiny-classification.json.gz").read_bytes()))
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])


def test_an_unknown_metric_is_refused_before_the_first_step(
    shards: dict[str, str], pretrained: str, tmp_path: Path
) -> None:
    found = run(tmp_path, shards, pretrained, "evaluation.metric=top2", processes=1)
    assert found.code == 2
    assert "error: evaluation.metric must be one of loss, top1, top5" in found.said
