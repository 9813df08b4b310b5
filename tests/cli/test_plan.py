"""Compares `mplug plan` with a real run, and checks its messages for runs that do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cli.main import main
from model.config.load import PRESETS, load_config
from model.training.attempts import saved_steps
from model.training.planning.estimate import _growth, activation_bytes, plan_run
from tests.helpers.paths import MPLUG

WIDE = [
    "model.vision.hidden_size=768",
    "model.vision.num_attention_heads=8",
    "model.vision.num_hidden_layers=2",
    "data.batch_size=64",
    "training.precision=fp32",
    "training.steps=3",
    "optim.warmup_steps=0",
    "checkpoint.every=1",
    "training.log_every=1",
    "model.use_contrastive=false",
    "data.max_length=24",
]


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([MPLUG, *arguments], capture_output=True, text=True, timeout=300)


def test_planned_memory_and_bytes_match_a_real_run(shards: dict[str, str], decoder: str, tmp_path: Path) -> None:
    settings = [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}", *WIDE]
    ended = command("train", "tiny_pretraining", *settings, f"output={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    history = (Path(ended.stdout.strip()) / "history.jsonl").read_text().splitlines()
    used = json.loads(history[-1])["system/node-0/process_memory_peak_gigabytes"] * 1e9
    found = plan_run(load_config("tiny_pretraining", settings), 1, on_cpu=True)
    assert found.memory.device + found.memory.host == pytest.approx(used, rel=0.1)
    assert found.memory.activations > 0.15 * used
    folder = next(tmp_path.glob("checkpoints/*"))
    state = load_file(folder / f"step-{saved_steps(str(folder))[0]:08d}" / "state-00000-of-00001.safetensors")
    assert sum(tensor.nbytes for tensor in state.values()) == found.checkpoint_bytes
    weights = load_file(Path(ended.stdout.strip()) / "model.safetensors")
    assert sum(tensor.nbytes for tensor in weights.values()) == found.model_bytes


def test_a_run_is_planned_without_weights_and_data() -> None:
    ended = command("plan", "pretrain_1.3b", "--nodes", "4", "--clips", "10000000", "--price", "2.5")
    assert ended.returncode == 0, ended.stderr
    assert "130,002,176 trained, 1,317,654,528 frozen" in ended.stdout
    assert "384 clips = 32 processes x 1 x 12 clips" in ended.stdout
    assert "260,410 steps" in ended.stdout
    assert "2.8 GB for batches read ahead" in ended.stdout


def test_a_run_that_does_not_fit_gets_the_cheapest_remedy() -> None:
    text = "model.text={model_type: gpt2, n_embd: 128, n_layer: 4, n_head: 4, n_positions: 128, vocab_size: 448}"
    one = ["--gpus", "1", "--gpu", "A10G", text, "data.batch_size=32768"]
    ended = command("plan", "tiny_pretraining", *one)
    assert ended.returncode == 1
    assert "does not fit" in ended.stdout
    remedy = ended.stdout.split("with: ")[1].split()
    again = command("plan", "tiny_pretraining", *one, *remedy)
    assert again.returncode == 0, again.stdout


def test_measuring_uses_the_decoder_of_the_configuration(shards: dict[str, str], decoder: str, tmp_path: Path) -> None:
    tree = yaml.safe_load((PRESETS / "tiny_pretraining.yaml").read_text())
    tree["data"] |= {"shards": shards["pretrain"], "batch_size": 8}
    tree["model"]["decoder"] = decoder
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    ended = command("plan", str(tmp_path / "mine.yaml"), "--gpus", "0", "--measure")
    assert ended.returncode == 0, ended.stderr
    assert "as measured here" in ended.stdout
    assert "other, measured here" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain_1.3b"], "data.shards does not exist yet: give the number of clips with --clips"),
        (["pretrain_1.3b", "--clips", "1000000", "--gpus", "7"], "data.batch_size must be a multiple of processes"),
        (["classification", "--clips", "100000"], "the shape of the decoder is unknown"),
    ],
)
def test_an_invalid_plan_is_a_one_line_error(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mplug", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    stderr = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"error: {message}" in stderr or message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("preset", ["tiny_pretraining", "tiny_instruction"])
def test_memory_does_not_need_the_values_of_products(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model.text={model_type: gpt2, n_embd: 128, n_layer: 4, n_head: 4, n_positions: 128, vocab_size: 448}"
    settings = ["model.decoder=none", "data.shards=none", *([text] if preset == "tiny_pretraining" else [])]
    config = load_config(preset, settings)
    estimated = activation_bytes(config, 4, on_cpu=True)
    monkeypatch.setattr("model.training.planning.peak_memory.PRODUCTS", set())
    _growth.cache_clear()
    assert activation_bytes(config, 4, on_cpu=True) == estimated
