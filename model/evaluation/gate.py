"""The gate before the registry: compares each new model with the champion of its task."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model import registry, storage
from model.config.schema import TASK_DATASETS, TrackingConfig
from model.errors import ConfigError, StageError
from model.evaluation.comparison import Difference, compare_evaluations
from model.evaluation.registration import registered_name
from model.evaluation.results import EVALUATION, UNRELIABLE, Evaluation, load_evaluation
from model.pipeline_run import reports_folder
from model.registry import Version


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a model may become the champion, by the headline metric of its task."""

    task: str
    metric: str
    value: float
    minimum: float
    difference: Difference | None
    """To the champion, on the same predictions; None if there is no champion yet."""
    tolerance: float

    @property
    def problems(self) -> list[str]:
        found = []
        if self.value < self.minimum:
            found.append(f"{self.task}: {self.metric} must be at least {self.minimum:.4f}, got {self.value:.4f}.")
        if self.difference and self.difference.low < -self.tolerance:
            found.append(
                f"{self.task}: {self.metric} must be at most {self.tolerance:g} below the champion's in 97.5 % of "
                f"resampled splits, but it is {self.difference}."
            )
        return found


def judge(evaluation: Evaluation, champion: Version | None, minimum: float, tolerance: float) -> Verdict:
    """A model must reach `minimum`, and the champion minus `tolerance` with confidence.

    Raises ConfigError if the evaluation is unreliable, or of another protocol than the champion's.
    """
    if reason := evaluation.protocol.get(UNRELIABLE):
        raise ConfigError(f"{evaluation.model}: this evaluation must not decide: {reason}.")
    difference = None
    if champion and champion.source != evaluation.model:
        theirs = load_evaluation(evaluation_of(champion))
        rows = compare_evaluations(evaluation, theirs)
        difference = next(row for row in rows if row.metric == evaluation.headline)
    return Verdict(
        task=evaluation.task,
        metric=evaluation.headline,
        value=evaluation.scores[evaluation.headline],
        minimum=minimum,
        difference=difference,
        tolerance=tolerance,
    )


def evaluation_of(version: Version) -> str:
    """URI of the evaluation that a version was registered with."""
    if EVALUATION not in version.tags:
        raise ConfigError(
            f"{version.name} version {version.number} must have the tag {EVALUATION}, but it was registered without. "
            "Evaluate and register it again."
        )
    return version.tags[EVALUATION]


def check_gate(
    uris: Sequence[str], root: str, where: Mapping[str, str], minimum: Mapping[str, float], tolerance: float
) -> list[Verdict]:
    """Publishes the verdicts with the report of the run, and in MLflow. Raises StageError if a model does not pass."""
    unknown = set(minimum) - set(TASK_DATASETS)
    if unknown:
        raise ConfigError(
            f"minimum must name tasks among {', '.join(TASK_DATASETS)}; got {', '.join(sorted(unknown))}."
        )
    verdicts = []
    for evaluation in map(load_evaluation, uris):
        champion = registry.find_champion(where["uri"], registered_name(evaluation.task)) if where["uri"] else None
        verdicts.append(judge(evaluation, champion, minimum.get(evaluation.task, 0.0), tolerance))
    tracking = TrackingConfig(**where)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "comparison.json"
        table.write_text(json.dumps([{**asdict(row), "passed": not row.problems} for row in verdicts], indent=1))
        storage.upload_file(table, storage.join(reports_folder(root, tracking), table.name))
        registry.attach_artifacts(tracking, [table], {f"{row.task}/{row.metric}": row.value for row in verdicts})
    if problems := [line for row in verdicts for line in row.problems]:
        raise StageError("\n".join(problems))
    return verdicts
