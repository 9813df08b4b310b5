"""Runs that are killed, terminated, resumed with another number of processes, or diverge."""

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest

from model.config.schema import CheckpointConfig
from model.errors import AttemptsError
from model.training import attempts
from model.training.attempts import saved_steps
from tests.helpers.killing import STEPS, Outcome, Training, workers


@pytest.fixture(scope="module")
def settings(shards: dict[str, str], decoder: str) -> list[str]:
    return [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}"]


def same(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.code == 0, outcome.stderr
    assert outcome.losses == undisturbed.losses
    assert [point["step"] for point in outcome.history] == list(range(1, STEPS + 1))
    assert outcome.weights == undisturbed.weights


def test_a_killed_process_does_not_change_losses_or_weights(
    settings: list[str], undisturbed: Outcome, tmp_path: Path
) -> None:
    # a surviving loader process would keep the output of this command open
    outcome = Training(tmp_path, settings).interrupted(lambda child: workers(child)[1].kill(), "data.workers=1")
    same(outcome, undisturbed)
    assert "restarting in" in outcome.stderr


@pytest.mark.parametrize("is_training", [False, True])
def test_a_killed_command_leaves_no_process_behind(settings: list[str], tmp_path: Path, is_training: bool) -> None:
    run = Training(tmp_path, settings)
    child = run.start("data.workers=1", "training.steps=500", processes=1)
    command = psutil.Process(child.pid)
    if is_training:
        run.wait_for(4, child)
    while not command.children():
        time.sleep(0.02)
    family = command.children(recursive=True)
    child.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    if is_training:
        assert "is saved, the next start resumes from it" in run.end(child).stderr


@pytest.fixture(scope="module")
def terminated(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Training:
    run = Training(tmp_path_factory.mktemp("terminated"), settings)
    # torchrun also signals the loader processes
    outcome = run.interrupted(lambda child: child.terminate(), "data.workers=1")
    assert outcome.code == 143
    assert "Traceback" not in outcome.stderr
    assert "DataLoader worker" not in outcome.stderr
    (folder,) = run.root.glob("checkpoints/*")
    assert f"step {saved_steps(str(folder))[0]} is saved" in outcome.stderr
    return run


def test_a_terminated_run_resumes_on_another_number_of_processes(
    terminated: Training, undisturbed: Outcome, tmp_path: Path
) -> None:
    shutil.copytree(terminated.root, tmp_path, dirs_exist_ok=True)
    outcome = Training(tmp_path, terminated.settings).run(processes=1)
    assert outcome.code == 0, outcome.stderr
    assert [point["step"] for point in outcome.history] == list(range(1, STEPS + 1))
    # each process averages over its own tokens, so results differ with the lengths of titles
    assert outcome.losses == pytest.approx(undisturbed.losses, rel=0.03)


def test_a_terminated_run_resumes_bit_identically(terminated: Training, undisturbed: Outcome) -> None:
    same(terminated.run(), undisturbed)
    again = terminated.run()
    assert again.code == 0
    (folder,) = terminated.root.glob("checkpoints/*")
    assert json.loads((folder / "run.json").read_text())["model"] == again.model  # it did not train
    assert "step/s" not in again.stderr


def test_a_diverging_run_rolls_back_and_ends_at_max_skips(settings: list[str], tmp_path: Path) -> None:
    diverging = ["optim.lr=1e30", "checkpoint.every=1", "training.max_skips=5", "training.consecutive_skips=2"]
    outcome = Training(tmp_path, settings).run(*diverging, processes=1)
    assert outcome.code == 1
    assert "is skipped: its gradients are not finite (1 so far)" in outcome.stderr
    assert "weights were restored from step" in outcome.stderr
    assert (
        "at most training.max_skips = 5 steps may have gradients that are not finite, got 6. Lower optim.lr"
        in outcome.stderr
    )
    assert "Traceback" not in outcome.stderr


def test_a_run_without_progress_fails_permanently(tmp_path: Path) -> None:
    limits, folder = CheckpointConfig(max_attempts=3), str(tmp_path)
    started = [attempts.start_attempt(folder, limits) for _ in range(3)]
    assert [attempt.number for attempt in started] == [1, 2, 3]
    assert len({attempt.key for attempt in started}) == 1
    with pytest.raises(AttemptsError, match="started 3 times without a checkpoint after step 0"):
        attempts.start_attempt(folder, limits)


def test_a_checkpoint_resets_the_attempts(tmp_path: Path) -> None:
    limits, folder = CheckpointConfig(max_attempts=2), str(tmp_path)
    for step in range(1, 6):
        for _ in range(2):
            attempts.start_attempt(folder, limits)
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{}")
    assert attempts.start_attempt(folder, limits).number == 11
