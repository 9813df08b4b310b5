"""Pictures for the README, from a finished demo: `make screenshots`."""

import json
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

import browser
import mlflow


def main(demo: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    server = subprocess.Popen([Path(sys.executable).with_name("mplug"), "ui", demo], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = server.stdout.readline().split()[1]
    try:
        with tempfile.TemporaryDirectory() as profile, browser.chromium(Path(profile)) as page:
            page.open(f"file://{(demo / 'report.html').resolve()}")
            page.picture(out / "report.png", height=2100)
            _mlflow(page, address, out)
    finally:
        server.terminate()
        server.wait()


def _mlflow(page: browser.Page, address: str, out: Path) -> None:
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment is not None
    found = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    page.open(
        f"{address}/#/experiments/{experiment.experiment_id}/runs/{found['tiny-pretraining-random']}/model-metrics"
    )
    page.wait_for("train/loss")
    page.picture(out / "mlflow-run.png", height=900)
    pair = [found[f"tiny-captioning-{init}"] for init in ("pretrained", "random")]
    query = urllib.parse.urlencode({"runs": json.dumps(pair), "experiments": json.dumps([experiment.experiment_id])})
    page.open(f"{address}/#/compare-runs?{query}")
    page.wait_for("Comparing 2 Runs")
    page.picture(out / "mlflow-compare.png", height=1000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
