"""Evaluation during training, and selection of the checkpoint that becomes the model."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.config.load import load_config
from model.distributed import Processes
from model.errors import ConfigError
from model.evaluation.runner import evaluate_model
from model.tasks.build import build_task
from model.training.attempts import saved_steps
from model.training.validation import Validation
from tests.helpers.copying import copied
from tests.helpers.killing import Outcome, Training
from tests.helpers.running import TINY


@pytest.fixture(scope="module")
def outcome(shards: dict[str, str], pretrained: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run whose first evaluation is the best, and which is interrupted after it."""
    remote = copied(shards["classification"], f"{s3}/validation")
    settings = [f"model.init_from={pretrained}", f"data.shards={remote}", "data.workers=1", "evaluation.every=4"]
    # in ZeRO-3, no process has all weights
    settings += ["training.zero_stage=3", "checkpoint.keep=1", "optim.lr=0.3"]
    settings += ["evaluation.metric=generation_top5"]  # does not improve with such a large learning rate
    root = tmp_path_factory.mktemp("validated")
    run = Training(root, settings, "tiny_classification")
    assert run.interrupted(lambda child: child.terminate()).code == 143
    found = run.run("--profile")
    assert found.code == 0, found.message
    return found


def test_the_best_checkpoint_becomes_the_model(outcome: Outcome, shards: dict[str, str]) -> None:
    scores = {point["step"]: point for point in outcome.history if "val/loss" in point}
    assert sorted(scores) == [4, 8, 12]
    best = max(sorted(scores), key=lambda step: scores[step]["val/generation_top5"])
    assert best == 4
    (folder,) = Path(outcome.model).parents[2].glob("checkpoints/*")
    assert saved_steps(str(folder)) == [12, 4]
    again = evaluate_model(outcome.model, shards=shards["classification"], split="val", batch_size=4).scores
    assert again == pytest.approx({name: scores[best][f"val/{name}"] for name in again})


def test_a_profile_of_three_steps_is_written(outcome: Outcome) -> None:
    root = Path(outcome.model).parents[2]
    assert f"profile of 3 steps: {root}/profiles/tiny-classification.json.gz" in outcome.stderr
    trace = json.loads(gzip.decompress((root / "profiles" / "tiny-classification.json.gz").read_bytes()))
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])


def test_invalid_evaluation_settings_are_rejected(shards: dict[str, str], pretrained: str) -> None:
    settings = [f"model.init_from={pretrained}", f"data.shards={shards['classification']}", *TINY]
    for override, message in (
        ("evaluation.metric=top2", "must be one of loss, top1, top5"),
        ("evaluation.clips=3", "at least"),
    ):
        config = load_config("tiny_classification", [*settings, override])
        with pytest.raises(ConfigError, match=message):
            Validation(build_task(config), config, Processes(0, 1, torch.device("cpu"), dist.group.WORLD))
