"""What MLflow links: training run, data, model by reference, evaluation, version."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from model import lineage, manifest, registry
from model.config.schema import TrackingConfig
from model.tracking import tracked

SCORES = {"val/top1": 0.75, "val/top5": 1.0}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingConfig]:
    monkeypatch.chdir(tmp_path)  # with SQLite, artifacts are stored below the current folder
    monkeypatch.setenv(lineage.GIT_COMMIT, "abc123")
    lineage.git_commit.cache_clear()
    yield TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="tests")
    lineage.git_commit.cache_clear()
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # mlflow sets it, which would affect commands of other tests


def published(folder: Path, run_id: str) -> str:
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_text("w")
    facts = {"config": {"name": "tiny"}, "run_id": run_id, "base_sha256": ""}
    return manifest.publish_folder(folder / "weights", f"{folder}/root/models/tiny", **facts)


def test_one_table_has_test_metric_and_learning_rate(config: TrackingConfig, tmp_path: Path) -> None:
    with tracked(config, "tiny.v1", description="classification on shards") as run:
        run.params({"optim.lr": 1e-3})
        run.dataset("classification-train", "d" * 64, "s3://b/shards/c@1", "training")
        uri = published(tmp_path, run.opened_id())
        run.tags({"model_uri": uri})
        for _ in range(2):  # a restarted run sends it again
            run.model(uri, 250, {"optim.lr": 1e-3})
    with tracked(config, "evaluate-tiny") as evaluation:
        evaluation.dataset("classification-val", "e" * 64, "s3://b/shards/c@1", "evaluation")
        evaluation.scores(SCORES, uri, "tiny", ("classification-val", "e" * 64))

    client = mlflow.MlflowClient(config.uri)
    trained = client.get_run(run.run_id)
    assert trained.data.params["optim.lr"] == "0.001"
    assert trained.data.metrics == SCORES
    assert trained.data.tags["mlflow.note.content"] == "classification on shards"
    assert trained.data.tags["mlflow.source.git.commit"] == "abc123"
    (data,) = trained.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("classification-train", "d" * 36)
    (output,) = trained.outputs.model_outputs

    (model,) = client.search_logged_models([trained.info.experiment_id])
    assert (model.model_id, output.step, model.name, str(model.status)) == (output.model_id, 250, "tiny-v1", "READY")
    assert model.source_run_id == run.run_id
    assert model.tags.items() >= {"uri": uri, "manifest_sha256": manifest.manifest_sha256(uri), "step": "250"}.items()
    assert model.params == {"optim.lr": "0.001"}
    assert {(each.key, each.value, each.dataset_name) for each in model.metrics} == {
        (key, value, "classification-val") for key, value in SCORES.items()
    }
    judged = client.get_run(evaluation.run_id)
    assert judged.data.metrics == SCORES
    assert [each.model_id for each in judged.inputs.model_inputs] == [model.model_id]
    assert [each.dataset.name for each in judged.inputs.dataset_inputs] == ["classification-val"]

    view = json.loads(client.get_experiment(trained.info.experiment_id).tags[f"mlflow.sharedViewState.{lineage.VIEW}"])
    assert "metrics.`val/top1`" in view["selectedColumns"]

    number = registry.register_model(config.uri, "mplug-video-classification", uri, {"task": "classification"})
    version = client.get_model_version("mplug-video-classification", number)
    assert (version.run_id, version.tags["model_id"], version.source) == (run.run_id, model.model_id, uri)


def test_a_model_of_others_is_linked_to_its_evaluation(config: TrackingConfig, tmp_path: Path) -> None:
    with tracked(config, "evaluate-converted") as run:
        run.scores(SCORES, str(tmp_path / "foreign"), "converted", ("captioning-val", "e"))
    client = mlflow.MlflowClient(config.uri)
    (model,) = client.search_logged_models([client.get_run(run.run_id).info.experiment_id])
    assert model.source_run_id is None or model.source_run_id == ""
    assert model.tags["uri"] == str(tmp_path / "foreign")
    assert {each.key for each in model.metrics} == set(SCORES)


def test_scores_without_a_server_are_in_the_journal() -> None:
    with tracked(TrackingConfig(), "evaluate-alone") as run:
        run.scores(SCORES, "m", "m", ("d", "e"))
    assert b'"val/top1": 0.75' in run.history()
