"""Training and evaluation with the real commands in separate processes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from model import manifest
from model.config.load import load_config
from model.data.loading.loader import ClipSource, training_batches
from model.data.loading.sampler import BatchSampler
from model.data.shards.reader import ShardReader
from model.mplug_video import MPlugVideoForPreTraining
from model.tasks.build import build_task
from model.training.optim import lr_at, parameter_groups
from tests.helpers.paths import MPLUG
from tests.helpers.running import TINY, train


def history(model: str) -> list[dict]:
    return [json.loads(line) for line in (Path(model) / "history.jsonl").read_text().splitlines()]


def plain_losses(preset: str, overrides: list[str]) -> list[float]:
    """The same run as a plain PyTorch loop."""
    config = load_config(preset, overrides)
    torch.manual_seed(config.seed)
    task = build_task(config)
    task.model.train()
    reader = ShardReader(f"{config.data.shards}/train")
    accumulation = config.training.gradient_accumulation
    sampler = BatchSampler(
        size=len(reader),
        seed=config.seed,
        batch_size=config.data.batch_size // accumulation,
        steps=config.training.steps * accumulation,
    )
    clips = ClipSource(reader=reader, processor=task.processor, augment=config.data, seed=config.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(task.network, config.optim), betas=config.optim.betas, eps=config.optim.eps
    )
    losses = []
    batches = iter(training_batches(clips, sampler, task.collate, config.data))
    for step in range(config.training.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config.training.steps, config.optim) * group["lr_scale"]
        parts = [task.network(next(batches))[0] / accumulation for _ in range(accumulation)]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return losses


def test_the_engine_matches_a_plain_pytorch_loop(shards: dict[str, str], decoder: str, tmp_path: Path) -> None:
    settings = [f"model.decoder={decoder}", f"data.shards={shards['pretrain']}", f"output={tmp_path}"]
    settings += [*TINY, "training.steps=5", "name=golden", "model.use_contrastive=false"]
    settings += ["training.gradient_accumulation=2", "optim.clip_grad_norm=0.5"]
    ours = history(train("tiny_pretraining", tmp_path, settings, steps=5))
    assert [point["train/loss"] for point in ours] == pytest.approx(
        plain_losses("tiny_pretraining", settings), rel=1e-4
    )


def test_a_frozen_decoder_is_unchanged_by_training(pretrained: str, decoder: str) -> None:
    model = MPlugVideoForPreTraining.from_pretrained(manifest.fetch_folder(pretrained))
    before = build_task(load_config("tiny_pretraining", [f"model.decoder={decoder}", "data.shards=unused"])).model
    for name, value in before.decoder.state_dict().items():
        torch.testing.assert_close(model.decoder.state_dict()[name].float(), value.to(torch.bfloat16).float())


def test_a_model_is_saved_with_configuration_and_history(pretrained: str) -> None:
    facts = manifest.read_manifest(pretrained)
    assert facts["config"]["task"] == "pretraining"
    last = history(pretrained)[-1]
    sections = {f"perf/{name}_s" for name in ("data", "forward", "backward", "optimizer", "checkpoint")}
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/clips_per_s", "perf/tokens_per_s", *sections} <= set(
        last
    )
    assert {"perf/data_wait_share", "perf/eta_hours", "system/node-0/cpu_utilization_percentage"} <= set(last)
    assert 0 < last["perf/mfu"] < 1.5  # relative to a large matrix product on this processor
    assert sum(last[section] for section in sections) <= last["perf/step_s"] * 1.01


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MPLUG, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def test_an_invalid_configuration_fails_with_code_2_before_start() -> None:
    ended = command("train", "tiny_pretraining", "optim.lrr=1", "training.steps=x")
    assert ended.returncode == 2
    assert all(line.startswith("error: ") for line in ended.stderr.splitlines())
    assert "optim.lrr is not a known key" in ended.stderr
    assert "training.steps" in ended.stderr


def test_an_indivisible_batch_size_is_rejected(shards: dict[str, str], decoder: str, tmp_path: Path) -> None:
    ended = command(
        "train",
        "tiny_pretraining",
        "--processes",
        "2",
        f"data.shards={shards['pretrain']}",
        f"model.decoder={decoder}",
        "data.batch_size=7",
        f"output={tmp_path}",
    )
    assert ended.returncode == 2
    assert ended.stderr.count("error: data.batch_size must be a multiple of processes") == 1
    assert "Traceback" not in ended.stderr


def test_unreadable_clips_end_the_command_with_code_3(shards: dict[str, str], decoder: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards["pretrain"], damaged)
    for tar in damaged.rglob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    ended = command(
        "train",
        "tiny_pretraining",
        f"data.shards={damaged}",
        f"model.decoder={decoder}",
        "data.batch_size=4",
        "data.workers=1",
        f"output={tmp_path}",
    )
    assert ended.returncode == 3
    assert ended.stderr.count("error: no clip of the first batch can be read:") == 1
    assert "started again" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_model_is_a_one_line_error(tmp_path: Path, shards: dict[str, str]) -> None:
    ended = command("evaluate", str(tmp_path / "nothing"), shards["retrieval"])
    assert ended.returncode == 3
    assert ended.stderr.count("\n") == 1
    assert "manifest.json" in ended.stderr
