import re
import subprocess
from pathlib import Path

import mlflow
import pytest

from model import storage
from model.data.annotations import read_annotations
from model.data.shards.build import ShardSettings
from model.data.shards.commit import build_shards
from model.data.shards.format import Form
from tests.helpers import browser
from tests.helpers.paths import MPLUG


@pytest.fixture(scope="module")
def shards_with_losses(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classification dataset with some empty clips."""
    import shutil

    folder = tmp_path_factory.mktemp("lossy")
    raw = folder / "raw"
    shutil.copytree(corpus, raw)
    for row in read_annotations(str(raw), "classification", "train")[:3]:
        storage.write(str(raw / row.video), b"")
    form = Form(num_frames=2, short_side=32)
    return build_shards(
        ShardSettings(raw=str(raw), root=str(folder), dataset="classification", form=form, max_quarantined=0.5)
    )


@pytest.fixture(scope="module")
def shown(shards_with_losses: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Output of the command, its page, and the tracking store."""
    folder = tmp_path_factory.mktemp("stats")
    store = f"sqlite:///{folder}/mlflow.db"
    command = [MPLUG, "data", "stats", shards_with_losses, "--out", str(folder / "stats.html"), "--tracking-uri", store]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "stats.html", store


def test_the_terminal_shows_splits_categories_and_reasons(shown: tuple[str, Path, str]) -> None:
    printed = shown[0]
    for part in ("train", "quarantined", "duration", "篮球", "体育", "empty", "█"):
        assert part in printed
    assert re.search(r"empty\s+3", printed)


def test_the_page_is_one_file_without_external_resources(shown: tuple[str, Path, str]) -> None:
    page = shown[1].read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^"'>\s]+""", page)
    assert page.count('src="data:image/png') == 3
    assert "empty" in page


def test_mlflow_has_metrics_tables_figures_and_the_page(shown: tuple[str, Path, str], tmp_path: Path) -> None:
    client = mlflow.MlflowClient(shown[2])
    experiment = client.get_experiment_by_name("mplug-video")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["classification/quarantined_train"] == 3
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "classification.html",
        "classification-distributions.png",
        "classification-categories.png",
        "classification-supers.png",
        "classification-category.json",
        "classification-super-category.json",
        "classification-resolution.json",
        "classification-quarantined-because.json",
    }


def test_a_browser_shows_the_categories(shown: tuple[str, Path, str], tmp_path: Path) -> None:
    if not browser.installed():
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    with browser.chromium(tmp_path) as page:
        page.open(f"file://{shown[1]}")
        page.wait_for("classification@")
        page.wait_for("quarantined because")
