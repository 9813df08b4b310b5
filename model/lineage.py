"""What MLflow links: runs, the data sets that they read, and the models that they make or score.

A published model is a LoggedModel by reference: its tags `uri`, `manifest_sha256` and `step` say where it is. MLflow
has no weights. Only the sender of tracking.py and registry.py call these functions, which talk to the server.
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import NotFoundError
from model.manifest import manifest_sha256

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

VIEW = "models"
VIEWED_RUNS, VIEWED_PARAMS = 1000, 12
TRAINED = "tags.model_uri LIKE '%'"
HEADLINES = {"top1", "generation_top1", "text_to_video_r1", "video_to_text_r1", "cider", "accuracy"}
FIRST = ("optim.lr", "model.init_from", "training.steps", "optim.", "training.", "seed", "")
"""Starts of parameters in the order of the columns."""
UNINTERESTING = ("name", "output", "tracking.", "code_version", "data.shards")
"""Starts of parameters that differ between any two runs, or that the data set shows."""
GIT_COMMIT = "MPLUG_GIT_COMMIT"
"""Variable with the commit of the code, in images, which have no repository."""
MAX_DIGEST = 36
"""MLflow's limit for the digest of a data set."""


def log_dataset(server: "MlflowClient", run_id: str, name: str, digest: str, uri: str, context: str) -> None:
    """Adds a data set to the inputs of a run, as "training" or "evaluation"."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source_type = "s3" if uri.startswith("s3://") else "local"
    found = Dataset(name, digest[:MAX_DIGEST], source_type, json.dumps({"uri": uri}))
    tags = [InputTag("mlflow.data.context", context)]
    server.log_inputs(run_id, datasets=[DatasetInput(found, tags)])


def log_model(server: "MlflowClient", run_id: str, uri: str, name: str, step: int, params: Mapping[str, str]) -> None:
    """Adds a published model to the outputs of the run that made it."""
    from mlflow.entities import LoggedModelOutput

    run = server.get_run(run_id)
    experiment, known = run.info.experiment_id, run.outputs.model_outputs if run.outputs else []
    model = find_model(server, experiment, uri) or _create_model(server, experiment, run_id, uri, name, step, params)
    if model.model_id not in {output.model_id for output in known}:  # a restarted run sends it again
        server.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])


def log_scores(
    server: "MlflowClient", run_id: str, uri: str, name: str, dataset: tuple[str, str], scores: Mapping[str, float]
) -> None:
    """Logs metrics of a model on a data set (name, digest): for the model, and for the run that made it."""
    from mlflow.entities import LoggedModelInput, Metric

    experiment = server.get_run(run_id).info.experiment_id
    model = find_model(server, experiment, uri) or _create_model(server, experiment, None, uri, name, 0, {})
    server.log_inputs(run_id, models=[LoggedModelInput(model.model_id)])
    now_ms, (data, digest) = int(time.time() * 1000), dataset
    for key, value in scores.items():
        server.log_metric(
            run_id,
            key,
            value,
            timestamp=now_ms,
            model_id=model.model_id,
            dataset_name=data,
            dataset_digest=digest[:MAX_DIGEST],
        )
    if model.source_run_id and model.source_run_id != run_id:
        step = int(model.tags.get("step", 0))
        server.log_batch(model.source_run_id, [Metric(key, value, now_ms, step) for key, value in scores.items()])
    save_view(server, experiment)


def save_view(server: "MlflowClient", experiment: str) -> None:
    """Saves the view VIEW of an experiment: its trained models, with headline metrics, data and what differs.

    <server>/#/experiments/<id>/runs?viewStateShareKey=models opens it, which the description of the experiment links.
    """
    runs = server.search_runs([experiment], TRAINED, max_results=VIEWED_RUNS)
    metrics = sorted({key for run in runs for key in run.data.metrics if key.partition("/")[2] in HEADLINES})
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.data.params.items():
            values.setdefault(key, set()).add(value)
    differing = [key for key in sorted(values) if len(values[key]) > 1 and not key.startswith(UNINTERESTING)]
    params = sorted(
        differing, key=lambda key: next(place for place, start in enumerate(FIRST) if key.startswith(start))
    )
    columns = [f"metrics.`{key}`" for key in metrics] + ["attributes.`Dataset`", "attributes.`Models`"]
    columns += [f"params.`{key}`" for key in params[:VIEWED_PARAMS]]
    state = {"searchFilter": TRAINED, "orderByKey": "params.`task`", "orderByAsc": True}
    state |= {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs"}
    view = json.dumps({**state, "selectedColumns": columns})
    server.set_experiment_tag(experiment, f"mlflow.sharedViewState.{VIEW}", view)
    link = f"[Compare trained models](#/experiments/{experiment}/runs?viewStateShareKey={VIEW})"
    server.set_experiment_tag(experiment, "mlflow.note.content", link)


def find_model(server: "MlflowClient", experiment: str, uri: str) -> "LoggedModel | None":
    """The LoggedModel of a published model."""
    from mlflow.entities import LoggedModelStatus

    found = server.search_logged_models([experiment], f"tags.uri = '{uri}'", max_results=1)
    if not found:
        return None
    if found[0].status != LoggedModelStatus.READY:  # interrupted while it was created
        return server.finalize_logged_model(found[0].model_id, LoggedModelStatus.READY)
    return found[0]


def _create_model(
    server: "MlflowClient",
    experiment: str,
    run_id: str | None,
    uri: str,
    name: str,
    step: int,
    params: Mapping[str, str],
) -> "LoggedModel":
    import mlflow

    try:
        sha256 = manifest_sha256(uri)
    except NotFoundError:  # published by others
        sha256 = ""
    tags, name = {"uri": uri, "manifest_sha256": sha256, "step": str(step)}, name.replace(".", "-")  # not in MLflow
    return mlflow.create_external_model(
        name=name, source_run_id=run_id, tags=tags, params=dict(params), model_type="mplug", experiment_id=experiment
    )


def run_tags(description: str) -> dict[str, str]:
    """Description, source and commit, which MLflow's page shows of a run."""
    tags = {"mlflow.source.type": "JOB" if "KUBERNETES_SERVICE_HOST" in os.environ else "LOCAL"}
    if description:
        tags |= {"mlflow.note.content": description}
    if commit := git_commit():
        tags |= {"mlflow.source.git.commit": commit}
    return tags


@cache
def git_commit() -> str:
    """The commit of the code; empty if it is not known."""
    if (commit := os.environ.get(GIT_COMMIT, "unknown")) != "unknown":
        return commit
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()
