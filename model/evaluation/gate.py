"""The gate before the registry: compares each new model with the champion of its task."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model import storage
from model.config.schema import TASK_DATASETS, TrackingConfig
from model.errors import ConfigError, StageError
from model.evaluation.registration import registered_name
from model.evaluation.results import Evaluation, load_evaluation
from model.pipeline_run import reports_folder
from model.registry import attach_artifacts, champion_scores


@dataclass(frozen=True, kw_only=True)
class Comparison:
    task: str
    metric: str
    value: float
    champion: float | None
    """Score of the champion; None if there is no champion yet."""
    required: float

    @property
    def passed(self) -> bool:
        return self.value >= self.required


def compare_with_champions(
    evaluations: Sequence[Evaluation], where: Mapping[str, str], minimum: Mapping[str, float], tolerance: float
) -> list[Comparison]:
    """Each task must reach its `minimum`, if one is given, and the score of its champion minus `tolerance`."""
    unknown = set(minimum) - set(TASK_DATASETS)
    if unknown:
        raise ConfigError(
            f"minimum must name tasks among {', '.join(TASK_DATASETS)}; got {', '.join(sorted(unknown))}."
        )
    found = []
    for evaluation in evaluations:
        metric = evaluation.headline
        known = (
            champion_scores(where["uri"], registered_name(evaluation.task), evaluation.protocol["split"])
            if where["uri"]
            else {}
        )
        champion = known.get(metric)
        bounds = [minimum.get(evaluation.task, 0.0), *([] if champion is None else [champion - tolerance])]
        value, required = evaluation.scores[metric], max(bounds)
        found.append(Comparison(task=evaluation.task, metric=metric, value=value, champion=champion, required=required))
    return found


def check_gate(
    uris: Sequence[str], root: str, where: Mapping[str, str], minimum: Mapping[str, float], tolerance: float
) -> list[Comparison]:
    """Publishes the comparison with the report of the run, and in MLflow. Raises StageError if a model is worse."""
    rows = compare_with_champions([load_evaluation(uri) for uri in uris], where, minimum, tolerance)
    tracking = TrackingConfig(**where)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "comparison.json"
        table.write_text(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], indent=1))
        storage.upload_file(table, storage.join(reports_folder(root, tracking), table.name))
        attach_artifacts(tracking, [table], {f"{row.task}/{row.metric}": row.value for row in rows})
    missed = [row for row in rows if not row.passed]
    if missed:
        lines = [
            f"{row.task}: {row.metric} must be at least {row.required:.4f}, got {row.value:.4f}." for row in missed
        ]
        raise StageError("\n".join(lines))
    return rows
