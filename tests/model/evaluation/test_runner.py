"""Evaluations: independent of batches and processes, with what was read, and refused for models that do not fit."""

import json
import pkgutil
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from model import manifest
from model.data.shards.reader import ShardReader, read_dataset_info
from model.data.synthetic.corpus import VIDEO
from model.errors import ConfigError
from model.evaluation.results import PREDICTIONS, SCORES, UNRELIABLE, load_evaluation
from model.evaluation.runner import _reservations, evaluate_model
from model.tasks import metrics
from model.tasks.retrieval import similarities
from tests.helpers.paths import MPLUG

IN_PROCESS = ["data.workers=0"]


def dataset_of(task: str) -> str:
    return "retrieval" if task == "matching" else task


@pytest.mark.parametrize("task", ["classification", "retrieval", "matching", "captioning"])
def test_scores_do_not_depend_on_the_batch_size(task: str, models: dict[str, str], shards: dict[str, str]) -> None:
    options = {"shards": shards[dataset_of(task)], "overrides": IN_PROCESS}
    one, many = (evaluate_model(models[task], batch_size=size, **options) for size in (1, 7))
    assert one.scores == many.scores
    for own, other in zip(one.predictions, many.predictions, strict=True):
        assert own.pop("generation_scores", []) == pytest.approx(other.pop("generation_scores", []), rel=1e-5)
        assert own.pop("head_scores", []) == pytest.approx(other.pop("head_scores", []), rel=1e-4, abs=1e-5)
        assert own == other


def test_two_processes_write_the_same_files_as_one(
    models: dict[str, str], shards: dict[str, str], tmp_path: Path
) -> None:
    for processes in ("1", "2"):
        options = ["--batch-size", "2", "--processes", processes, "--out", str(tmp_path / processes)]
        command = [MPLUG, "evaluate", models["classification"], shards["classification"], *options, *IN_PROCESS]
        ended = subprocess.run([*command, "--tracking-uri", ""], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found = load_evaluation(str(tmp_path / processes))
        assert json.loads(ended.stdout) == found.scores
        assert f"\n{found.protocol_line}\n" in f"\n{ended.stderr}"
    for name in (SCORES, PREDICTIONS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_predictions_say_which_frames_were_read(models: dict[str, str], shards: dict[str, str]) -> None:
    uri = shards["captioning"]
    settings = [*IN_PROCESS, "model.vision.num_frames=2"]
    found = evaluate_model(models["captioning"], shards=uri, overrides=settings)
    reader = ShardReader(f"{uri}/val")
    assert found.protocol["frames"].startswith("2, ")
    assert found.protocol["data"] == f"captioning@{read_dataset_info(uri)['sha256']['val'][:12]}"
    assert found.protocol["rows"] == str(len(reader))
    for position, row in enumerate(found.predictions):
        stored = reader.record(position).media[0].frames
        ((first, last),) = row["frames"]
        assert {first, last} <= set(stored)
        assert first < last
        assert len(row["frames_sha256"]) == 64
    assert len({row["frames_sha256"] for row in found.predictions}) == len(reader)


def test_every_score_has_an_interval_around_it(models: dict[str, str], shards: dict[str, str]) -> None:
    found = evaluate_model(models["retrieval"], shards=shards["retrieval"], overrides=IN_PROCESS)
    assert found.intervals.keys() == found.scores.keys() == set(metrics.RECALL_METRICS)
    assert all(low <= found.scores[name] <= high for name, (low, high) in found.intervals.items())
    assert found.scores == metrics.score(found.measures)


@pytest.mark.parametrize(
    ("model", "dataset", "overrides", "message"),
    [
        ("captioning", "classification", [], "has no head for task classification: classifier.0.bias is missing"),
        ("captioning", "retrieval", [], "has no head for task retrieval"),
        ("retrieval", "classification", [], "has no head for task classification"),
        ("matching", "classification", [], "the classes of .* must be those of .*; only one of them has 否"),
        ("captioning", "pretrain", [], "an evaluation needs shards of classification, retrieval, captioning, instruct"),
        ("captioning", "captioning", ["task=retrieval"], "task retrieval needs shards of retrieval, but"),
        ("captioning", "instruction", [], "task instruction needs a model of type mplug-owl, but .* is of type mplug_"),
        ("captioning", "captioning", ["data.worker=1"], "data.worker"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    model: str, dataset: str, overrides: list[str], message: str, models: dict[str, str], shards: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_model(models[model], shards=shards[dataset], overrides=[*IN_PROCESS, *overrides])


def test_a_chat_model_needs_zero_shot_for_categories(instructed: str, shards: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"needs a model of type mplug_video, .* --zero-shot asks any"):
        evaluate_model(instructed, shards=shards["classification"], overrides=IN_PROCESS)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_model_without_configuration_has_its_own_sizes(
    has_manifest: bool, models: dict[str, str], shards: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(models["classification"], folder)
    (folder / manifest.FILE).unlink()
    if has_manifest:
        (folder / manifest.FILE).write_bytes(manifest.describe_folder(folder))
    options = {"shards": shards["classification"], "overrides": [*IN_PROCESS, "data.max_length=48"]}
    found = evaluate_model(str(folder), **options)
    expected = evaluate_model(models["classification"], **options)
    assert found.scores == expected.scores
    assert found.protocol == expected.protocol
    assert not found.pretrained
    assert expected.pretrained


def test_reranking_orders_the_best_results_anew(
    models: dict[str, str], shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    for module, name in (("retrieval.Retrieval", "first"), ("matching.Matching", "all"), ("reranking.Reranking", "")):
        path = f"model.tasks.{module}.finish"
        finish = pkgutil.resolve_name(path)

        def spy(rows: list, name: str = name, finish: object = finish) -> list:
            seen[name] = rows
            return finish(rows)

        monkeypatch.setattr(path, staticmethod(spy))
    options = {"shards": shards["retrieval"], "overrides": IN_PROCESS}
    evaluate_model(models["retrieval"], **options)
    evaluate_model(models["matching"], **options)
    found = evaluate_model(models["retrieval"], rerank=models["matching"], top_k=3, **options)
    cosine = similarities(seen["first"])[0](slice(None))  # (texts, clips)
    match = np.stack([row["head_scores"] for row in seen["all"]]).T
    for text, row in enumerate(found.predictions):
        best = np.argsort(-cosine[text], kind="stable")[:3].tolist()
        again = sorted(best, key=lambda clip: -match[text, clip])
        assert row["nearest_clips"][:3] == again
        own = again.index(text) + 1 if text in again else 1 + int((cosine[text] >= cosine[text, text]).sum() - 1)
        assert row["text_to_video_rank"] == own
    assert found.protocol["reranking"].startswith("the best 3 by the head of ")


def test_only_retrieval_can_be_reranked(models: dict[str, str], shards: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--rerank needs a retrieval model"):
        evaluate_model(
            models["captioning"], shards=shards["captioning"], overrides=IN_PROCESS, rerank=models["matching"]
        )


def test_released_retrieval_test_texts_are_unreliable() -> None:
    own = VIDEO.format(dataset="retrieval", split="test", index=0)
    assert _reservations("retrieval", "test", own) == {}
    assert _reservations("retrieval", "val", "videos/a.mp4") == {}
    assert "do not belong to their videos" in _reservations("retrieval", "test", "videos/a.mp4")[UNRELIABLE]
