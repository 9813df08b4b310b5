"""`mplug push` to both hubs: a refused token, an upload that is killed and repeated, and the content of the card."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from model.evaluation.card import Release, write_release
from model.evaluation.results import load_evaluation
from model.evaluation.runner import evaluate_model
from tests.helpers.fake_hub import TOKEN, FakeHub, fake_hub
from tests.helpers.paths import MPLUG

REPO = "alice/mplug-tiny"
PRIVATE = {"huggingface": "private", "modelscope": "1"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture(scope="module")
def evaluation(models: dict[str, str], shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluation")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    evaluate_model(models["retrieval"], shards=shards["retrieval"], overrides=["data.workers=0"], out=str(folder))
    return str(folder)


def start(server: FakeHub, home: Path, hub: str, model: str, token: str = TOKEN) -> subprocess.Popen[str]:
    addresses = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}
    tokens = {"HF_TOKEN": token, "MODELSCOPE_API_TOKEN": token}
    homes = {"HF_HOME": str(home / "hf"), "MODELSCOPE_HOME": str(home / "ms"), "MODELSCOPE_CACHE": str(home / "cache")}
    return subprocess.Popen(
        [MPLUG, "push", model, REPO, "--hub", hub, "--license", "apache-2.0", "--tracking-uri", ""],
        env={**os.environ, **addresses, **tokens, **homes},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_an_upload_that_was_killed_continues(name: str, hub: FakeHub, models: dict[str, str], tmp_path: Path) -> None:
    weights = (Path(models["retrieval"]) / "model.safetensors").read_bytes()
    hub.holds_commits = True
    first = start(hub, tmp_path, name, models["retrieval"])
    assert hub.commit_arrived.wait(60), first.communicate(timeout=10)
    first.kill()
    first.communicate()
    assert hub.uploaded > 0
    assert REPO not in hub.files

    hub.holds_commits, hub.uploaded = False, 0
    second = start(hub, tmp_path, name, models["retrieval"])
    out, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert out.strip().endswith(REPO)
    assert hub.uploaded < len(weights) / 100
    assert hub.visibility == {REPO: PRIVATE[name]}
    files = hub.files[REPO]
    assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"README.md", "config.json", "results.json", "manifest.json", "tokenizer.json"} <= files.keys()


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_wrong_token_is_named_in_one_line(name: str, hub: FakeHub, models: dict[str, str], tmp_path: Path) -> None:
    process = start(hub, tmp_path, name, models["retrieval"], token="wrong")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in errors.splitlines() if line.startswith("error")][-1].startswith(f"error: {name} refuses")
    assert "Traceback" not in errors


def test_a_hub_that_does_not_answer_is_an_outage(models: dict[str, str], tmp_path: Path) -> None:
    with fake_hub() as closed:
        pass
    process = start(closed, tmp_path, "huggingface", models["retrieval"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 134
    assert errors.splitlines()[-1].startswith("error: huggingface does not answer: ")


def test_the_card_has_scores_protocol_and_no_address(
    models: dict[str, str], shards: dict[str, str], evaluation: str, tmp_path: Path
) -> None:
    found, folder = load_evaluation(evaluation), tmp_path / "card"
    command = [MPLUG, "push", models["retrieval"], REPO, "--license", "apache-2.0", "--tracking-uri", ""]
    subprocess.run([*command, "--evaluation", evaluation, "--dry-run", str(folder)], check=True)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "feature-extraction"
    results = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in results.items()} == pytest.approx(found.scores, abs=1e-6)
    first = results["text_to_video_r1"]
    assert first.dataset_name == found.protocol["data"]
    assert first.dataset_args == found.protocol
    assert tuple(first.metric_args["interval_95"]) == pytest.approx(found.intervals["text_to_video_r1"], abs=1e-6)
    assert all(f"- {name}: {value}" in card.text for name, value in found.protocol.items())
    (result,) = json.loads((folder / "results.json").read_text())
    assert result["scores"] == found.scores
    for path in folder.iterdir():  # the models of the tests are below this folder
        assert str(Path(models["retrieval"]).parents[1]).encode() not in path.read_bytes(), path.name

    again = evaluate_model(str(folder), shards=shards["retrieval"], overrides=["data.workers=0"])
    assert again.scores == found.scores
    assert again.protocol == found.protocol


def test_a_chat_model_has_its_own_classes_in_the_card(instructed: str, tmp_path: Path) -> None:
    write_release(Release(model=instructed, repo=REPO, hub="modelscope", license="bigscience-bloom-rail-1.0"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "from model.mplug_owl_video import MplugOwlForConditionalGeneration, MplugOwlProcessor" in card
    assert f"ms-hub download {REPO} --local-dir model" in card
    assert str(Path(instructed).parents[2]) not in (tmp_path / "config.json").read_text()


def test_scores_of_another_model_are_refused(models: dict[str, str], evaluation: str, tmp_path: Path) -> None:
    command = [MPLUG, "push", models["captioning"], REPO, "--license", "apache-2.0", "--tracking-uri", ""]
    ended = subprocess.run(
        [*command, "--evaluation", evaluation, "--dry-run", str(tmp_path / "card")], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: evaluations must be of ")
    assert not (tmp_path / "card").exists()
