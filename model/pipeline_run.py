"""The MLflow run of a pipeline, which is the parent of the runs of its stages. Its status follows the pipeline run.

The first step opens it and the exit handler closes it. Kubeflow Pipelines does not repeat the exit handler when a run
is retried. So once the handler has run, each stage reopens the run when it starts and closes it when it ends.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from model import storage
from model.config.schema import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param, Run

RUN_ID = "MPLUG_KFP_RUN"
"""Variable with the ID of the Kubeflow Pipelines run that this process belongs to. Unset outside of one."""
KFP_RUN = "pipeline.kfp_run"
"""Tag with that ID: two concurrent Kubeflow Pipelines runs of the same name have separate MLflow runs."""
Outcome = Literal["succeeded", "failed", "cancelled"]
STATUS: dict[Outcome, str] = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
PIPELINE = "mplug.pipeline"
"""Tag with the pipeline's parameter `run_name`."""
CONTINUES = "pipeline.continues"
"""Tag with the ID of the failed run that this one continues. Stages that it had finished are nested there."""
LAST_STAGES = "pipeline.last_stages"
"""Tag set by the exit handler: the stages that must finish for the pipeline to succeed."""
FAILED_STAGES, MISSING_STAGES = "pipeline.failed", "pipeline.missing"


def open_pipeline_run(server: "MlflowClient", experiment: str, name: str, params: Mapping[str, str]) -> str:
    """ID of the run. Reopens a finished run of the same name. If that run failed, was cancelled or belongs to another
    Kubeflow Pipelines run, creates a new one that continues it.
    """
    from mlflow.entities import Param

    own, run_id = find_pipeline_run(server, experiment, name), os.environ.get(RUN_ID, "")
    if own and (run_id or own.info.status not in ("FAILED", "KILLED")):
        reopen(server, own)
        if not run_id:
            _forget_end(server, own)
        return str(own.info.run_id)
    earlier = next(iter(_pipeline_runs(server, experiment, name)), None)
    if earlier and earlier.info.status == "FINISHED":
        server.set_tag(earlier.info.run_id, KFP_RUN, run_id)
        reopen(server, earlier)
        _forget_end(server, earlier)
        return str(earlier.info.run_id)
    return create_pipeline_run(server, experiment, name, earlier, [Param(*item) for item in params.items()])


def create_pipeline_run(
    server: "MlflowClient", experiment: str, name: str, earlier: "Run | None", params: Sequence["Param"] = ()
) -> str:
    tags = {"mlflow.runName": name, PIPELINE: name, KFP_RUN: os.environ.get(RUN_ID, "")}
    if earlier:
        tags[CONTINUES] = earlier.info.run_id
    run_id: str = server.create_run(experiment, tags=tags).info.run_id
    server.log_batch(run_id, params=params)
    return run_id


def find_pipeline_run(server: "MlflowClient", experiment: str, name: str) -> "Run | None":
    """The run of this process's Kubeflow Pipelines run; outside of one, the newest run of this name."""
    run_id = os.environ.get(RUN_ID, "")
    found = _pipeline_runs(server, experiment, name)
    return next((run for run in found if not run_id or run.data.tags.get(KFP_RUN) == run_id), None)


def _forget_end(server: "MlflowClient", run: "Run") -> None:
    """A new pipeline run has its own exit handler, which sets the tag again."""
    if LAST_STAGES in run.data.tags:
        server.delete_tag(run.info.run_id, LAST_STAGES)


def reports_folder(root: str, tracking: TrackingConfig) -> str:
    """Folder for the reports of a pipeline run; every Kubeflow Pipelines run has a separate one."""
    return storage.join(root, "reports", tracking.pipeline or "local", *filter(None, [os.environ.get(RUN_ID, "")]))


def reopen(server: "MlflowClient", run: "Run") -> None:
    if run.info.status != "RUNNING":
        server.update_run(run.info.run_id, "RUNNING")


def close_pipeline_run(server: "MlflowClient", run: "Run", last_stages: Sequence[str], outcome: Outcome | None) -> str:
    """Closes the run with the given outcome, or else with the outcome of its stages, which it returns in one line.

    Stages that were killed are closed as well.
    """
    server.set_tag(run.info.run_id, LAST_STAGES, " ".join(last_stages))
    for stage in _newest(server, run).values():
        if stage.info.status == "RUNNING":
            server.set_terminated(stage.info.run_id, "KILLED")
    failed, missing = _unfinished(server, run, last_stages)
    found: Outcome = outcome or ("failed" if failed or missing else "succeeded")
    server.set_terminated(run.info.run_id, STATUS[found])
    if found == "succeeded":
        return "succeeded"
    return f"{found}; failed: {', '.join(failed) or 'nothing'}; never started: {', '.join(missing) or 'nothing'}"


def close_after_retry(server: "MlflowClient", run_id: str) -> None:
    """Closes the pipeline's run after a stage has ended, if the exit handler has already run."""
    run = server.get_run(run_id)
    if LAST_STAGES not in run.data.tags:
        return
    failed, missing = _unfinished(server, run, run.data.tags[LAST_STAGES].split())
    stages = _newest(server, run)
    if failed:
        is_killed = all(stages[name].info.status == "KILLED" for name in failed)
        server.set_terminated(run_id, "KILLED" if is_killed else "FAILED")
    elif not missing and all(stage.info.status != "RUNNING" for stage in stages.values()):
        server.set_terminated(run_id, "FINISHED")


def _unfinished(server: "MlflowClient", run: "Run", last_stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stages that failed, and last stages that never finished. Both are set as tags of the run.

    A last stage that was taken from the cache has finished under an earlier run of the same name.
    """
    own = _newest(server, run)
    failed = sorted(name for name, stage in own.items() if stage.info.status not in ("FINISHED", "RUNNING"))
    earlier = _pipeline_runs(server, run.info.experiment_id, run.data.tags[PIPELINE])
    known = {*own, *(name for other in earlier for name in _newest(server, other, finished=True))}
    missing = [name for name in last_stages if name not in known]
    server.set_tag(run.info.run_id, FAILED_STAGES, " ".join(failed))
    server.set_tag(run.info.run_id, MISSING_STAGES, " ".join(missing))
    return failed, missing


def _pipeline_runs(server: "MlflowClient", experiment: str, name: str) -> list["Run"]:
    return server.search_runs([experiment], f"tags.`{PIPELINE}` = '{name}'", order_by=["attributes.start_time DESC"])


def _newest(server: "MlflowClient", run: "Run", *, finished: bool = False) -> dict[str, "Run"]:
    """The newest run of each stage by name; with `finished`, the newest finished one."""
    of_it = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'" + (" AND attributes.status = 'FINISHED'" * finished)
    stages = server.search_runs([run.info.experiment_id], of_it, order_by=["attributes.start_time ASC"])
    return {stage.info.run_name: stage for stage in stages}
