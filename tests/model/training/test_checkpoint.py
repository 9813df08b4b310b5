"""Complete and damaged checkpoints of one process, in a folder and on a real S3 server."""

import json
import shutil
from pathlib import Path

import pytest

from model import manifest, storage
from model.config.schema import CheckpointConfig
from model.distributed import Processes
from model.errors import ConfigError, DataError
from model.tasks.build import build_task
from model.training.attempts import run_folder, saved_steps
from model.training.checkpoint import Checkpoints, frozen_sha256
from model.training.engine import Engine
from model.training.state import Progress
from tests.helpers.running import pretraining_config


@pytest.fixture(scope="module")
def engine(decoder: str, group: Processes) -> Engine:
    config = pretraining_config(decoder)
    return Engine(build_task(config).network, config, group)


def checkpoints(engine: Engine, group: Processes, folder: str, *, keep: int = 2, base: str = "b") -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep=keep), engine, base, group)


def fill(engine: Engine, value: float) -> None:
    for tensor in engine.state.tensors().values():
        tensor.fill_(value)


def value(engine: Engine) -> float:
    """The number that fills all state, including the weights of the network."""
    found = {float(number) for tensor in engine.state.tensors().values() for number in tensor.unique()}
    found |= {
        float(weights.detach().unique()) for weights in engine.engine.module.parameters() if weights.requires_grad
    }
    assert len(found) == 1
    return found.pop()


def save(engine: Engine, store: Checkpoints, *steps: int, best: int = -1) -> None:
    for step in steps:
        fill(engine, step)
        store.save(step, f'{{"step": {step}}}\n'.encode(), {"progress": {"step": step}}, best)
        store.wait()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('s3')}/checkpoints/{tmp_path.name}"


def test_a_checkpoint_restores_all_state(engine: Engine, group: Processes, place: str) -> None:
    store = checkpoints(engine, group, place)
    assert store.restore() is None
    save(engine, store, 4)
    fill(engine, 0)
    again = checkpoints(engine, group, place)
    restored = again.restore()
    assert restored
    assert restored["progress"] == {"step": 4}
    assert value(engine) == 4
    assert again.history() == [{"step": 4}]


def test_the_newest_and_the_best_are_kept(engine: Engine, group: Processes, place: str) -> None:
    store = checkpoints(engine, group, place)
    storage.write(f"{place}/step-00000003/state-00000-of-00001.safetensors", b"half-written by a killed process")
    save(engine, store, 1, 2, 4, 6, 8, best=2)
    assert saved_steps(place) == [8, 6, 2]
    assert {entry.path.partition("/")[0] for entry in storage.walk(place)} == {
        "step-00000002",
        "step-00000006",
        "step-00000008",
    }


def test_a_failed_checkpoint_is_recorded_as_lost(
    engine: Engine, group: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    store = checkpoints(engine, group, str(tmp_path / "run"))
    save(engine, store, 4)
    assert "checkpoint of step 4 was not written by process 0" in caplog.text
    assert store.pending_step == 4
    progress = Progress(step=4)
    for value in (float("nan"), 1.0, 2.0):
        progress.note(value, lower_is_better=True)
    assert (progress.best_step, progress.best_value) == (4, 1.0)
    progress.forget_best()
    progress.note(3.0, lower_is_better=True)
    assert progress.best_value == 3.0


def test_errors_of_the_writing_thread_are_raised_in_the_loop(
    engine: Engine, group: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(manifest, "commit_folder", commit)
    store = checkpoints(engine, group, str(tmp_path / "run"))
    store.save(4, b"", {})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        store.wait()


def test_a_save_in_progress_uses_a_copy(engine: Engine, group: Processes, place: str) -> None:
    store = checkpoints(engine, group, place)
    fill(engine, 7)
    store.save(7, b"", {})
    fill(engine, 0)
    store.wait()
    store.restore()
    assert value(engine) == 7


DAMAGES = {
    "a flipped byte": lambda folder: flip(folder / "state-00000-of-00001.safetensors"),
    "a short file": lambda folder: (folder / "state-00000-of-00001.safetensors").write_bytes(b"short"),
    "a missing file": lambda folder: (folder / "state-00000-of-00001.safetensors").unlink(),
    "another history": lambda folder: (folder / "history.jsonl").write_text('{"step": 5}'),
    "no history": lambda folder: (folder / "history.jsonl").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {'),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    engine: Engine, group: Processes, tmp_path: Path, damage: str
) -> None:
    store = checkpoints(engine, group, str(tmp_path))
    save(engine, store, 1, 2)
    DAMAGES[damage](tmp_path / "step-00000002")
    restored = store.restore()
    assert restored
    assert (restored["step"], value(engine)) == (1, 1.0)
    save(engine, store, 3)  # checkpoints after the damaged one do not remove the good ones
    assert saved_steps(str(tmp_path))[0] == 3


def test_a_run_fails_if_all_checkpoints_are_damaged(engine: Engine, group: Processes, tmp_path: Path) -> None:
    store = checkpoints(engine, group, str(tmp_path))
    save(engine, store, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / "state-00000-of-00001.safetensors")
    with pytest.raises(DataError, match="none of the 2 checkpoints"):
        store.restore()


def test_other_frozen_weights_are_rejected(engine: Engine, group: Processes, tmp_path: Path) -> None:
    save(engine, checkpoints(engine, group, str(tmp_path), base="one"), 1)
    with pytest.raises(ConfigError, match="the frozen weights must be those"):
        checkpoints(engine, group, str(tmp_path), base="another").restore()


def test_frozen_weights_are_hashed_and_not_saved(
    decoder: str, tmp_path: Path, engine: Engine, group: Processes
) -> None:
    network = build_task(pretraining_config(decoder)).network
    before = frozen_sha256(network)
    assert before == frozen_sha256(build_task(pretraining_config(decoder, "seed=7")).network)
    next(network.model.decoder.parameters()).data.view(-1)[0] += 1
    assert frozen_sha256(network) != before
    save(engine, checkpoints(engine, group, str(tmp_path)), 1)
    trained = sum(weights.numel() for weights in network.parameters() if weights.requires_grad)
    size = (tmp_path / "step-00000001" / "state-00000-of-00001.safetensors").stat().st_size
    assert trained * 12 < size < trained * 12 + 100_000


def test_a_failed_checkpoint_does_not_end_the_run(
    engine: Engine, group: Processes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = checkpoints(engine, group, str(tmp_path / "run"))
    save(engine, store, 1)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where a folder should be")
    save(engine, store, 2)
    assert "checkpoint of step 2 was not written" in caplog.text
    (tmp_path / "run").unlink()
    save(engine, store, 3)
    assert saved_steps(str(tmp_path / "run")) == [3]


def test_settings_that_affect_the_result_change_the_folder(decoder: str) -> None:
    first = run_folder(pretraining_config(decoder))
    machine = [
        "data.workers=3",
        "training.zero_stage=2",
        "training.gradient_accumulation=2",
        "tracking.uri=sqlite:///x",
    ]
    assert run_folder(pretraining_config(decoder, *machine)) == first
    for other in (
        "optim.lr=1e-5",
        "seed=1",
        "trial=2",
        "data.batch_size=4",
        "tracking.pipeline=p",
        "training.steps=9",
    ):
        assert run_folder(pretraining_config(decoder, other)) != first


def test_a_manifest_describes_the_run(engine: Engine, group: Processes, tmp_path: Path) -> None:
    save(engine, checkpoints(engine, group, str(tmp_path)), 5)
    facts = json.loads((tmp_path / "step-00000005" / "manifest.json").read_text())
    assert {"step": 5, "world_size": 1, "zero_stage": 1, "base_sha256": "b"}.items() <= facts.items()
    assert set(facts["files"]) == {"history.jsonl", "state-00000-of-00001.safetensors"}
