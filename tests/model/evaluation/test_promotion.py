"""Registered models: the gate, promotions that are recorded, rollback, and what a version carries."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli import models
from model import manifest, registry, storage
from model.errors import ConfigError, DataError, StageError
from model.evaluation import promotion
from model.evaluation.bootstrap import intervals
from model.evaluation.comparison import compare_evaluations
from model.evaluation.gate import check_gate
from model.evaluation.promotion import promote, read_history, rollback
from model.evaluation.registration import register_candidates
from model.evaluation.results import UNRELIABLE, Evaluation, load_evaluation, save_evaluation
from model.tasks import metrics
from tests.helpers.paths import MPLUG

NAME = "mplug-video-classification"
ROWS = 200
PROTOCOL = {"data": "classification@1", "split": "val", "frames": "4"}
Register = Callable[..., str]


@pytest.fixture(autouse=True)
def _own_tracking_uri() -> Iterator[None]:
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # mlflow sets it, which would affect commands of other tests


def evaluated(model: str, right: float, **protocol: str) -> Evaluation:
    """An evaluation in which the first `right` of all predictions are right."""
    measures = {"top1": (np.arange(ROWS) < right * ROWS).astype(float)}
    videos = [f"{row}.mp4" for row in range(ROWS)]
    rows = [
        {"video": video, "shown": {"predicted": "", "true": ""}, "measures": {"top1": value}}
        for video, value in zip(videos, measures["top1"].tolist(), strict=True)
    ]
    return Evaluation(
        task="classification",
        model=model,
        shards="s",
        protocol={**PROTOCOL, **protocol},
        pretrained=True,
        scores=metrics.score(measures),
        intervals=intervals(measures, videos),
        untuned={},
        chance={},
        class_names=[],
        headline="top1",
        predictions=rows,
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow, which takes seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    assert registry.list_names(f"sqlite:///{path}") == []
    return path


@pytest.fixture
def uri(database: Path, tmp_path: Path) -> str:
    shutil.copy(database, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def register(tmp_path: Path, uri: str) -> Register:
    """Publishes a model and registers it with an evaluation; returns name/version."""

    def make(right: float, **protocol: str) -> str:
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(f"{right} {protocol}")
        facts = {"config": {"name": "x", "trial": 1, "code_version": ""}, "run_id": "", "base_sha256": "b1"}
        model = manifest.publish_folder(folder, f"{tmp_path}/root/models/tiny", **facts)
        where = save_evaluation(evaluated(model, right, **protocol), f"{model}.val")
        (found,) = register_candidates([where], {"uri": uri}, "code", "image:1")
        return found

    return make


def version(uri: str, reference: str) -> registry.Version:
    return registry.find_version(uri, reference)


def test_a_version_carries_where_it_comes_from(register: Register, uri: str) -> None:
    found = version(uri, register(0.5))
    tags = found.tags
    assert (tags["data"], tags["code_version"], tags["image"], tags["base_sha256"]) == (
        "classification@1",
        "code",
        "image:1",
        "b1",
    )
    assert json.loads(tags["config"])["name"] == "x"
    assert tags["val.top1"] == "0.5000"
    assert tags["val.top1.interval"].startswith("0.4")
    assert load_evaluation(tags["evaluation"]).model == found.source
    assert found.aliases == ("candidate",)
    assert models.find_model(f"{NAME}@candidate", uri) == (found.source, [load_evaluation(tags["evaluation"])])
    assert register(0.5) == f"{NAME}/1"  # the same model is registered once


def test_only_a_better_model_becomes_champion(register: Register, uri: str) -> None:
    first, worse, better = register(0.5), register(0.4), register(0.6)
    assert promote(uri, version(uri, first)).before == ""
    with pytest.raises(
        StageError, match=r"top1 must be at most 0 below the champion's in 97.5 % of .*, but it is 0.40"
    ):
        promote(uri, version(uri, worse))
    assert version(uri, f"{NAME}@champion").number == "1"
    record = promote(uri, version(uri, better))
    assert (record.before, record.to) == ("1", "3")
    assert "difference +0.1000" in record.difference
    assert version(uri, f"{NAME}@champion").number == "3"
    with pytest.raises(ConfigError, match="is the champion already"):
        promote(uri, version(uri, better))
    assert promote(uri, version(uri, first), tolerance=0.2).before == "3"


def test_rollbacks_step_back(register: Register, uri: str) -> None:
    for right in (0.3, 0.4, 0.5):
        promote(uri, version(uri, register(right)))
    assert [rollback(uri, NAME).to for _ in range(2)] == ["2", "1"]
    assert version(uri, f"{NAME}@champion").number == "1"
    with pytest.raises(ConfigError, match="has had no champion before version 1"):
        rollback(uri, NAME)
    history = read_history(version(uri, NAME))
    assert [(each.action, each.before, each.to) for each in history] == [
        ("promote", "", "1"),
        ("promote", "1", "2"),
        ("promote", "2", "3"),
        ("rollback", "3", "2"),
        ("rollback", "2", "1"),
    ]
    assert promote(uri, version(uri, f"{NAME}/3")).before == "1"
    assert rollback(uri, NAME).to == "1"


def test_of_two_promotions_at_once_one_is_told(register: Register, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(uri, version(uri, register(0.3)))
    both, create = threading.Barrier(2), storage.create

    def together(*arguments: object) -> bool:
        both.wait(60)
        return create(*arguments)

    candidates = [version(uri, register(right)) for right in (0.5, 0.6)]
    monkeypatch.setattr(promotion.storage, "create", together)

    with ThreadPoolExecutor(2) as pool:
        attempts = [pool.submit(promote, uri, candidate) for candidate in candidates]
    (lost,) = filter(None, (attempt.exception() for attempt in attempts))
    (won,) = (attempt.result() for attempt in attempts if not attempt.exception())
    assert isinstance(lost, StageError)
    assert "was changed at the same time" in str(lost)
    assert version(uri, f"{NAME}@champion").number == won.to


def test_an_edited_record_is_found(register: Register, uri: str, tmp_path: Path) -> None:
    for right in (0.3, 0.4):
        promote(uri, version(uri, register(right)))
    record = tmp_path / "root" / "registry" / NAME / "000001.json"
    before = record.read_text(encoding="utf-8")
    record.write_text(before.replace("there was no champion", "better by far"), encoding="utf-8")
    with pytest.raises(DataError, match=r"000002.json must follow the record before it"):
        rollback(uri, NAME)


def test_an_interrupted_promotion_is_completed(register: Register, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(uri, version(uri, register(0.3)))
    second, third = register(0.4), register(0.5)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(registry, "set_champion", fail)
        with pytest.raises(KeyboardInterrupt):
            promote(uri, version(uri, second))
    assert version(uri, f"{NAME}@champion").number == "1"
    assert promote(uri, version(uri, third)).before == "2"


def test_a_rollback_starts_at_the_recorded_champion(register: Register, uri: str) -> None:
    for right in (0.3, 0.4):
        promote(uri, version(uri, register(right)))
    registry.set_champion(uri, NAME, "1")  # as if the last promotion had been interrupted before this
    record = rollback(uri, NAME)
    assert (record.before, record.to) == ("2", "1")


@pytest.mark.parametrize("change", [{"split": "test"}, {"frames": "8"}, {"data": "classification@2"}, {"more": "x"}])
def test_other_protocols_are_not_comparable(change: dict[str, str]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=f"must have the same protocol to be compared, but {key} is"):
        compare_evaluations(evaluated("a", 0.5), evaluated("b", 0.5, **change))


def test_other_clips_are_not_comparable() -> None:
    ours = evaluated("a", 0.5)
    with pytest.raises(ConfigError, match="the clips are others"):
        compare_evaluations(ours, replace(ours, predictions=ours.predictions[::-1]))


def test_the_gate_of_a_pipeline(register: Register, uri: str, tmp_path: Path) -> None:
    where = {"uri": uri, "experiment": "test", "pipeline": ""}
    first, worse = (version(uri, register(right)).tags["evaluation"] for right in (0.5, 0.45))
    gate = {"root": str(tmp_path / "root"), "where": where, "tolerance": 0.0}
    assert check_gate([first], minimum={"classification": 0.5}, **gate)[0].difference is None
    with pytest.raises(StageError, match=r"classification: top1 must be at least 0.5100, got 0.5000\."):
        check_gate([first], minimum={"classification": 0.51}, **gate)
    promote(uri, version(uri, f"{NAME}/1"))
    check_gate([first], minimum={}, **gate)  # the champion itself
    with pytest.raises(StageError, match="below the champion's"):
        check_gate([worse], minimum={}, **gate)
    check_gate([worse], minimum={}, **(gate | {"tolerance": 0.2}))
    (verdict,) = json.loads(next(tmp_path.rglob("comparison.json")).read_text())
    assert verdict["passed"]
    assert verdict["difference"]["theirs"] == 0.5
    unreliable = version(uri, register(0.9, **{UNRELIABLE: "wrong texts"})).tags["evaluation"]
    with pytest.raises(ConfigError, match="must not decide: wrong texts"):
        check_gate([unreliable], minimum={}, **gate)


def test_the_commands(
    register: Register, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    first, second = register(0.5), register(0.6)
    models.promote(first, uri)
    models.list_models(uri)
    models.compare(second, f"{NAME}@champion", uri)
    models.show(NAME, uri)
    models.reproduce(NAME, uri, tmp_path)
    printed = capsys.readouterr()
    for text in (
        f"{NAME}: champion none -> 1",
        "val.top1 0.5000 (0.4",
        "+0.1000",
        "– → 1",
        f"mplug train {tmp_path}/{NAME}-2.yaml",
    ):
        assert text in printed.out
    assert "data: classification@1; split: val" in printed.err
    assert json.loads((tmp_path / f"{NAME}-2.yaml").read_text()) == {"name": "x", "trial": 2, "code_version": ""}
    command = [MPLUG, "models", "show", f"{NAME}/9", "--tracking-uri", uri]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (
        2,
        f"error: {NAME}/9 does not exist. Known: @candidate, @champion, /2, /1.\n",
    )
