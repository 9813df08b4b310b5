"""The report of one or many models, opened in Chromium."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from model.evaluation.report import render_report
from model.evaluation.results import Evaluation
from model.evaluation.runner import evaluate_model
from tests.helpers import browser

PHONE = 390


@pytest.fixture(scope="module")
def evaluations(models: dict[str, str], shards: dict[str, str]) -> list[Evaluation]:
    found = [
        evaluate_model(models[task], shards=shards[task], overrides=["data.workers=0"])
        for task in ("classification", "retrieval", "captioning")
    ]
    first = found[0]
    rows = [
        {**row, "prediction": row["label"], "measures": {**row["measures"], "top1": 1.0}}
        | {"shown": {"predicted": row["label"], "true": row["label"]}}
        for row in first.predictions
    ]
    right = replace(first, model="models/always-right", predictions=rows, scores={**first.scores, "top1": 1.0})
    other = replace(right, model="models/other-frames", protocol={**right.protocol, "frames": "8"})
    return [first, right, other, *found[1:]]


def test_the_page_compares_models(evaluations: list[Evaluation]) -> None:
    page = render_report(evaluations)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for text in (
        evaluations[0].protocol_line,
        "tiny-classification − always-right",
        "tiny-classification − other-frames",
        "evaluations must have the same protocol to be compared, but frames is",
        "published<br>1.3B, val",
        "README of X-PLUG/Youku-mPLUG",
        "changed most",
        "8 categories",
        "mistaken for",
    ):
        assert text in page, text
    low, high = evaluations[0].intervals["top1"]
    assert f"<small>{low:.3f}–{high:.3f}</small>" in page


def test_one_model_has_no_differences(evaluations: list[Evaluation]) -> None:
    page = render_report(evaluations[-1:])
    assert " − " not in page
    assert "best" in page
    assert "worst" in page


@pytest.mark.skipif(not browser.installed(), reason="no Chromium")
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_the_page_fits_the_screen(width: int, evaluations: list[Evaluation], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_report(evaluations), encoding="utf-8")
    with browser.chromium(tmp_path) as page:
        page.open_narrow(path.as_uri(), width)
        page.wait_for("tiny-classification")
        assert page.driver.execute_script("return document.documentElement.clientWidth") == width
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
        sizes = page.driver.execute_script("return [...document.images].map(image => image.naturalWidth)")
        assert len(sizes) > 20
        assert all(sizes)
