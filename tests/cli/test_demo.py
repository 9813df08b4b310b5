"""A small demo: interrupted, repeated until it finishes, repeated from the cache; then its results are checked."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest

from tests.helpers import browser
from tests.helpers.paths import MPLUG

SHORT = ["training.steps=3", "training.log_every=1", "optim.warmup_steps=1", "data.batch_size=8"]
BENCHMARKS = ("classification", "retrieval", "captioning")
STAGES = {
    "download",
    "shard",
    "tokenizer",
    "tiny-decoder-titles",
    "tiny-pretraining-random",
    "tiny-instruction-random",
    "evaluate-tiny-instruction-random",
    "register",
    "report",
} | {
    f"{prefix}tiny-{task}-{init}"
    for prefix in ("", "evaluate-")
    for task in BENCHMARKS
    for init in ("pretrained", "random")
}


def demo(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MPLUG_CACHE": str(folder / "cache")}
    command = [MPLUG, "demo", str(folder), "--scale", "0.02", *SHORT]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def processes_of(folder: Path) -> list[psutil.Process]:
    """All processes with the demo's folder in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> str:
    """Output of a demo that was interrupted during training."""
    child = demo(folder)
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("✓ train-tokenizer"):
            time.sleep(6)  # the next stage starts its processes
            child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130, "".join(lines)
    return "".join(lines)


@pytest.fixture(scope="module")
def finished(folder: Path, interrupted: str) -> str:
    """Output of the repeated demo, which finished."""
    output, _ = demo(folder).communicate(timeout=540)
    assert "results on the test splits" in output, output + (folder / "pipeline.log").read_text()[-4000:]
    return output


def test_an_interrupted_demo_leaves_no_process_behind(folder: Path, interrupted: str) -> None:
    assert processes_of(folder) == []
    assert "Traceback" not in interrupted


def test_a_repeated_demo_resumes(folder: Path, interrupted: str, finished: str) -> None:
    assert "rendering" not in finished
    # kfp runs independent stages in any order; the stages that had finished are not repeated
    before, after = (set(re.findall(r"✓ ([a-z-]+)", output)) for output in (interrupted, finished))
    assert "train-tokenizer" in before
    assert before & after <= {"start-run"}
    assert processes_of(folder) == []


def test_a_demo_that_is_too_short_lists_missed_requirements(finished: str) -> None:
    assert re.search(r"missed: classification top1 is 0\.\d+, required ≥ 0\.500", finished)


def test_the_report_is_one_file_without_external_resources(folder: Path, finished: str) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^"'>\s]+""", page)
    for part in (
        "Pre-training",
        "confusion matrix",
        "frames of a clip",
        "clip found",
        "top1",
        "cider",
        "accuracy_what",
        "untuned",
    ):
        assert part in page


@pytest.fixture(scope="module")
def repeated(folder: Path, finished: str) -> str:
    """Output of a third demo, for which all stages are cached."""
    output, _ = demo(folder).communicate(timeout=300)
    return output


def test_a_third_demo_uses_the_cache_for_every_stage(folder: Path, finished: str, repeated: str) -> None:
    assert "results on the test splits" in repeated
    assert "step/s" not in repeated
    executed = re.findall(r"Executing task .*?'([a-z0-9-]+)'", (folder / "pipeline.log").read_text(encoding="utf-8"))
    assert set(executed) <= {"start-run", "finish-run"}


@pytest.fixture(scope="module")
def tracking(folder: Path, repeated: str) -> Iterator[mlflow.MlflowClient]:
    """MLflow and S3 of the demo, started like `mplug ui`."""
    child = subprocess.Popen([MPLUG, "ui", str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    address = child.stdout.readline().split()[1]
    before = dict(os.environ)
    from cli.services import local_services

    os.environ.update(local_services(folder).environment())
    yield mlflow.MlflowClient(address)
    os.environ.clear()
    os.environ.update(before)
    child.send_signal(signal.SIGINT)
    child.wait(timeout=60)
    assert processes_of(folder) == []


def runs(client: mlflow.MlflowClient) -> dict[str, mlflow.entities.Run]:
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run for run in found}  # for an interrupted stage, the run that finished it


def test_every_stage_is_a_child_of_one_parent_run(tracking: mlflow.MlflowClient) -> None:
    found = runs(tracking)
    parent = found.pop("demo")
    assert parent.info.status == "FINISHED"
    assert set(found) == STAGES
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_a_training_run_shows_its_configuration_and_curves(tracking: mlflow.MlflowClient) -> None:
    run = runs(tracking)["tiny-pretraining-random"]
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["training.precision"] == "bf16"
    for key in ("train/loss", "train/lr", "train/grad_norm", "perf/clips_per_s", "perf/data_wait_share"):
        assert [point.step for point in tracking.get_metric_history(run.info.run_id, key)] == [1, 2, 3]


def test_an_evaluation_has_tables_and_a_figure_in_s3(tracking: mlflow.MlflowClient, tmp_path: Path) -> None:
    run = runs(tracking)["evaluate-tiny-captioning-pretrained"]
    assert {item.path for item in tracking.list_artifacts(run.info.run_id)} >= {
        "metrics.json",
        "predictions.json",
        "predictions.png",
    }
    picture = tracking.download_artifacts(run.info.run_id, "predictions.png", str(tmp_path))
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert "test/cider" in run.data.metrics


def test_each_fine_tuned_model_is_registered_as_a_candidate(tracking: mlflow.MlflowClient) -> None:
    for task, start in (*((task, "pretrained") for task in BENCHMARKS), ("instruction", "random")):
        version = tracking.get_model_version_by_alias(f"mplug-video-{task}", "candidate")
        base, _, content = version.source.rpartition("/")
        assert base == f"s3://mplug/demo/models/tiny-{task}-{start}"
        assert version.tags["manifest_sha256"].startswith(content)


def test_mlflows_run_and_compare_pages_show_the_runs(tracking: mlflow.MlflowClient, tmp_path: Path) -> None:
    if not browser.installed():
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    found = runs(tracking)
    run = found["tiny-retrieval-pretrained"].info
    pair = [found[f"tiny-retrieval-{init}"].info.run_id for init in ("pretrained", "random")]
    query = urllib.parse.urlencode({"runs": json.dumps(pair), "experiments": json.dumps([run.experiment_id])})
    with browser.chromium(tmp_path) as page:
        page.open(f"{tracking.tracking_uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}")
        page.wait_for("tiny-retrieval-pretrained")
        page.wait_for("train/loss")
        page.open(f"{tracking.tracking_uri}/#/compare-runs?{query}")
        page.wait_for("Comparing 2 Runs")


def test_one_view_leads_from_test_metrics_to_the_version_and_its_run(
    tracking: mlflow.MlflowClient, tmp_path: Path
) -> None:
    if not browser.installed():
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    experiment = tracking.get_experiment_by_name("mplug-video")
    assert experiment is not None
    with browser.chromium(tmp_path) as page:
        page.driver.set_window_size(4000, 1000)  # MLflow draws only the columns in the window
        page.open(f"{tracking.tracking_uri}/#/experiments/{experiment.experiment_id}")
        page.follow("Compare trained models")
        for text in ("tiny-classification-pretrained", "classification-train", "test/top1", "optim.lr"):
            page.wait_for(text)
        page.follow("mplug-video-classification")
        page.wait_for("Version 1")
        page.follow("tiny-classification-pretrained")
        page.wait_for("train/loss")
        assert runs(tracking)["tiny-classification-pretrained"].info.run_id in page.driver.current_url
