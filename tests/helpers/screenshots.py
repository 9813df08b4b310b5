"""Screenshots of a finished demo for the README: `make screenshots`."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import mlflow

from cli.services import local_services
from tests.helpers import browser


def main(demo: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    server = subprocess.Popen([Path(sys.executable).with_name("mplug"), "ui", demo], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().split()[1]
    try:
        with tempfile.TemporaryDirectory() as profile, browser.chromium(Path(profile)) as page:
            page.open(f"file://{(demo / 'report.html').resolve()}")
            page.picture(out / "report.png", height=2100)
            shards = _mlflow(page, address, out)
            _statistics(page, demo, shards, Path(profile) / "stats.html", out)
    finally:
        server.terminate()
        server.wait()


def _statistics(page: browser.Page, demo: Path, shards: str, page_file: Path, out: Path) -> None:
    """The page of `mplug data stats`. The demo's S3 server is running."""
    environment = {**os.environ, **local_services(demo).environment()}
    command = [Path(sys.executable).with_name("mplug"), "data", "stats", shards, "--out", page_file]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    page.open(f"file://{page_file}")
    page.picture(out / "stats.png", height=1500)


def _mlflow(page: browser.Page, address: str, out: Path) -> str:
    """Pictures of MLflow's pages; returns the shards that a run was trained on."""
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment is not None
    found = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    page.open(
        f"{address}/#/experiments/{experiment.experiment_id}/runs/{found['tiny-pretraining-random']}/model-metrics"
    )
    page.search("Search metric charts", "train/")  # charts outside the view are not drawn, and perf/ comes first
    page.wait_for("train/loss")
    page.picture(out / "mlflow-run.png", height=1000)
    pair = [found[f"tiny-captioning-{init}"] for init in ("pretrained", "random")]
    query = urllib.parse.urlencode({"runs": json.dumps(pair), "experiments": json.dumps([experiment.experiment_id])})
    page.open(f"{address}/#/compare-runs?{query}")
    page.wait_for("Comparing 2 Runs")
    page.picture(out / "mlflow-compare.png", height=1000)
    shards: str = client.get_run(found["tiny-classification-pretrained"]).data.params["data.shards"]
    return shards


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
