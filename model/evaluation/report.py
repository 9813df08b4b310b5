"""The report of a pipeline run: one self-contained HTML page with metrics, curves, and clips with predictions."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from model import manifest, storage
from model.config.schema import TrackingConfig
from model.data.shards.reader import ShardReader
from model.evaluation.acceptance import Requirement, check_requirements, compared
from model.evaluation.figures import confusion_figure, curve_figure, frame_strip
from model.evaluation.pages import figure_uri, image_uri, render_page
from model.evaluation.results import Evaluation, load_evaluation
from model.pipeline_run import reports_folder
from model.registry import attach_artifacts

SHOWN = 8
"""Clips per task."""
NEAREST = 3
"""Clips shown per retrieval query."""


def publish_report(uris: Sequence[str], shards: Mapping[str, str], root: str, where: Mapping[str, str]) -> str:
    """Writes report.html and results.json to <root>/reports/<pipeline run>, and to the MLflow run."""
    evaluations = [load_evaluation(uri) for uri in uris]
    results = list(check_requirements(evaluations))
    tracking = TrackingConfig(**where)
    uri = reports_folder(root, tracking)
    rows = json.dumps([{**asdict(result), "passed": result.passed} for result in results], indent=1)
    with tempfile.TemporaryDirectory() as folder:
        html, table = Path(folder) / "report.html", Path(folder) / "results.json"
        html.write_text(render_report(evaluations, results, shards), encoding="utf-8")
        table.write_text(rows, encoding="utf-8")
        for path in (html, table):
            storage.upload_file(path, storage.join(uri, path.name))
        attach_artifacts(tracking, [html, table], {f"{row.task}/{row.metric}": row.value for row in results})
    return storage.join(uri, "report.html")


def render_report(evaluations: Sequence[Evaluation], results: Sequence[Requirement], shards: Mapping[str, str]) -> str:
    """The page as text."""
    found = compared(evaluations)
    by_task = {task: evaluation for task, (evaluation, _) in found.items()}
    splits = {task: evaluation.protocol["split"] for task, evaluation in by_task.items()}
    readers = {task: ShardReader(storage.join(shards[task], split)) for task, split in splits.items()}
    values = {
        "results": results,
        "tasks": [
            {
                "name": task,
                "baseline": "untuned" if evaluation.untuned else "without pre-training",
                "rows": _score_rows(evaluation, baseline),
                "curve": figure_uri(curve_figure(_curves(task, evaluations), "training loss")),
                "strips": _strips(evaluation, readers[task]),
            }
            for task, (evaluation, baseline) in found.items()
        ],
        "pretraining": figure_uri(curve_figure({"pre-training": _pretraining_curve(evaluations)}, "training loss")),
        "confusion": figure_uri(
            confusion_figure(by_task["classification"].confusion, by_task["classification"].class_names)
        ),
        "searches": _searches(by_task["retrieval"], readers["retrieval"]),
    }
    return render_page("report.html.j2", values)


def _score_rows(evaluation: Evaluation, baseline: Mapping[str, float]) -> list[dict[str, float | str | None]]:
    return [
        {"metric": name, "value": value, "baseline": baseline[name], "chance": evaluation.chance.get(name)}
        for name, value in evaluation.scores.items()
    ]


def _curves(task: str, evaluations: Sequence[Evaluation]) -> dict[str, list[tuple[int, float]]]:
    return {
        "with pre-training" if evaluation.pretrained else "without": _history(evaluation.model)
        for evaluation in evaluations
        if evaluation.task == task
    }


def _pretraining_curve(evaluations: Sequence[Evaluation]) -> list[tuple[int, float]]:
    model = next(evaluation.model for evaluation in evaluations if evaluation.pretrained)
    return _history(manifest.read_manifest(model)["config"]["model"]["init_from"])


def _history(model: str) -> list[tuple[int, float]]:
    """(step, loss) of the run that made a model."""
    lines = storage.read(storage.join(model, "history.jsonl")).decode().splitlines()
    points = map(json.loads, lines)
    return [(point["step"], point["train/loss"]) for point in points if "train/loss" in point]


def _strips(evaluation: Evaluation, reader: ShardReader) -> list[dict[str, str]]:
    return [
        {"image": image_uri(frame_strip(reader, position, 4)), "predicted": predicted, "true": true}
        for position, (predicted, true) in enumerate(evaluation.captions[:SHOWN])
    ]


def _searches(evaluation: Evaluation, reader: ShardReader) -> list[dict[str, object]]:
    """Texts with their most similar clips."""
    return [
        {
            "text": row["text"],
            "clips": [
                (image_uri(frame_strip(reader, clip, 4, height=54)), clip == query)
                for clip in row["nearest_clips"][:NEAREST]
            ],
        }
        for query, row in enumerate(evaluation.predictions[:SHOWN])
    ]
