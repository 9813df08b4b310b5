"""The report of evaluations, one self-contained HTML page: scores, differences, curves, clips with predictions."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import manifest, storage
from model.config.schema import TrackingConfig
from model.data.shards.reader import ShardReader
from model.errors import ConfigError, StorageError
from model.evaluation.acceptance import Requirement, check_requirements
from model.evaluation.comparison import compare_evaluations
from model.evaluation.figures import confusion_figure, curve_figure, frame_strip
from model.evaluation.pages import figure_uri, image_uri, render_page
from model.evaluation.published import PUBLISHED
from model.evaluation.results import Evaluation, load_evaluation
from model.pipeline_run import reports_folder
from model.registry import attach_artifacts
from model.tasks.metrics import category_table, lower_is_better

log = logging.getLogger("mplug")
SHOWN = 4
"""Clips in each gallery."""
NEAREST = 3
"""Clips shown per retrieval query."""
QUALITY = {
    "classification": ("top1", "generation_top1"),
    "retrieval": ("text_to_video_rank",),
    "matching": ("text_to_video_rank",),
    "captioning": ("cider",),
    "instruction": ("accuracy",),
}
"""Measures by which a prediction is good or bad; the first that it has. Of ranks, low is good."""


def publish_report(uris: Sequence[str], root: str, where: Mapping[str, str]) -> str:
    """Writes report.html and results.json to <root>/reports/<pipeline run>, and to the MLflow run."""
    evaluations = [load_evaluation(uri) for uri in uris]
    results = list(check_requirements(evaluations))
    tracking = TrackingConfig(**where)
    uri = reports_folder(root, tracking)
    rows = json.dumps([{**asdict(result), "passed": result.passed} for result in results], indent=1)
    with tempfile.TemporaryDirectory() as folder:
        html, table = Path(folder) / "report.html", Path(folder) / "results.json"
        html.write_text(render_report(evaluations, results), encoding="utf-8")
        table.write_text(rows, encoding="utf-8")
        for path in (html, table):
            storage.upload_file(path, storage.join(uri, path.name))
        attach_artifacts(tracking, [html, table], {f"{row.task}/{row.metric}": row.value for row in results})
    return storage.join(uri, "report.html")


def render_report(evaluations: Sequence[Evaluation], results: Sequence[Requirement] = ()) -> str:
    """The page as text. Models of a task are compared with its first one."""
    tasks: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        tasks.setdefault(evaluation.task, []).append(evaluation)
    initial = dict.fromkeys(start for evaluation in evaluations if (start := _started_from(evaluation)))
    values = {
        "results": results,
        "pretraining": _curves({_label(model): _history(model) for model in initial}),
        "tasks": [_section(task, own) for task, own in tasks.items()],
    }
    return render_page("report.html.j2", values)


def _section(task: str, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What the page shows of a task."""
    first, labels = evaluations[0], _labels(evaluations)
    reader = ShardReader(storage.join(first.shards, first.protocol["split"]))
    return {
        "name": task,
        "labels": labels,
        "protocols": list(dict.fromkeys(each.protocol_line for each in evaluations)),
        "untuned": first.untuned,
        "rows": [
            {
                "metric": metric,
                "values": [(each.scores.get(metric), each.intervals.get(metric)) for each in evaluations],
                "untuned": first.untuned.get(metric),
                "chance": first.chance.get(metric),
                "published": [each.scores.get(metric) for each in PUBLISHED.get(task, [])],
            }
            for metric in first.scores
        ],
        "published": PUBLISHED.get(task, []),
        "differences": [
            _differences(first, other, labels[0], label)
            for other, label in zip(evaluations[1:], labels[1:], strict=True)
        ],
        "categories": _categories(evaluations),
        "confusion": figure_uri(confusion_figure(first.confusion, first.class_names)) if first.confusion else "",
        "curve": _curves({label: _history(each.model) for each, label in zip(evaluations, labels, strict=True)}),
        "galleries": _galleries(evaluations, labels, reader),
    }


def _differences(first: Evaluation, other: Evaluation, ours: str, theirs: str) -> dict[str, Any]:
    """The metrics of the first model minus those of another, or why they cannot be compared."""
    title = f"{ours} − {theirs}"
    try:
        return {"title": title, "rows": compare_evaluations(first, other), "problem": ""}
    except ConfigError as error:
        return {"title": title, "rows": [], "problem": str(error)}


def _categories(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each category its clips and recalls, those first in which the first model differs most from the second."""
    if not evaluations[0].confusion:
        return []
    tables = [category_table(each.predictions, each.class_names) for each in evaluations]
    by_name = [{row["category"]: row for row in table} for table in tables]
    rows = [
        {**row, "recalls": [table[row["category"]]["recall"] for table in by_name if row["category"] in table]}
        for row in tables[0]
    ]
    return sorted(rows, key=lambda row: -abs((row["recalls"][0] or 0) - (row["recalls"][-1] or 0)))


def _galleries(evaluations: Sequence[Evaluation], labels: Sequence[str], reader: ShardReader) -> list[dict[str, Any]]:
    """The best, the worst and, with two models, the most changed predictions."""
    first, *others = evaluations
    own = _qualities(first)
    order = sorted(range(len(own)), key=lambda row: -own[row])
    rows = {"best": order[:SHOWN], "worst": order[::-1][:SHOWN]}
    if others and others[0].videos == first.videos:
        theirs = _qualities(others[0])
        changed = sorted(range(len(own)), key=lambda row: -abs(own[row] - theirs[row]))
        rows["changed most"] = [row for row in changed[:SHOWN] if own[row] != theirs[row]]
    shown = [first, *(each for each in others[:1] if each.videos == first.videos)]
    return [
        {"title": title, "clips": [_clip(shown, labels, reader, row) for row in chosen]}
        for title, chosen in rows.items()
        if chosen
    ]


def _clip(evaluations: Sequence[Evaluation], labels: Sequence[str], reader: ShardReader, row: int) -> dict[str, Any]:
    """A clip with the predictions of one or two models; of a search, the clips that the first one has found."""
    prediction = evaluations[0].predictions[row]
    found = prediction.get("nearest_clips", [])[:NEAREST]
    return {
        "image": image_uri(frame_strip(reader, row, 4)),
        "true": prediction["shown"]["true"],
        "predicted": [
            (label, each.predictions[row]["shown"]["predicted"])
            for each, label in zip(evaluations, labels[: len(evaluations)], strict=True)
        ],
        "found": [(image_uri(frame_strip(reader, clip, 4, height=54)), clip == row) for clip in found],
    }


def _qualities(evaluation: Evaluation) -> list[float]:
    """How good each prediction is; higher is better."""
    measures = evaluation.measures
    name = next(name for name in QUALITY[evaluation.task] if name in measures)
    values = measures[name].tolist()
    return [-value for value in values] if lower_is_better(name) else values


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Short and different names of the models."""
    labels = [_label(evaluation.model) for evaluation in evaluations]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} {manifest.version_of(each.model)}" for label, each in zip(labels, evaluations, strict=True)]


def _label(model: str) -> str:
    return _config(model).get("name") or manifest.version_of(model)


def _config(model: str) -> dict[str, Any]:
    """The configuration that a model was trained with; empty if it was not trained here, or cannot be read any more."""
    try:
        return manifest.read_manifest(model).get("config") or {}
    except StorageError as error:
        log.warning("the report goes without the configuration of %s: %s", model, error)
        return {}


def _started_from(evaluation: Evaluation) -> str:
    return str(_config(evaluation.model).get("model", {}).get("init_from", ""))


def _history(model: str) -> list[tuple[int, float]]:
    """(step, loss) of the run that made a model; empty if it has none, or cannot be read any more."""
    try:
        lines = storage.read(storage.join(model, "history.jsonl")).decode().splitlines()
    except StorageError as error:
        log.warning("the report goes without the losses of %s: %s", model, error)
        return []
    points = map(json.loads, lines)
    return [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]


def _curves(curves: Mapping[str, list[tuple[int, float]]]) -> str:
    """A figure of training losses; empty if there are none."""
    known = {label: points for label, points in curves.items() if points}
    return figure_uri(curve_figure(known, "training loss")) if known else ""
