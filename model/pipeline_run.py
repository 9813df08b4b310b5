"""The MLflow run of a pipeline, under which its stages nest theirs. Its state follows that of the pipeline's run.

It is opened by the first step and closed by the exit handler. Kubeflow Pipelines does not run an exit handler again
when a run is retried: after it has run, each stage reopens the pipeline's run, and closes it again as it ends itself.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Outcome = Literal["succeeded", "failed", "cancelled"]
STATUS: dict[Outcome, str] = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
PIPELINE = "mplug.pipeline"
"""Tag: the pipeline's name for this run, `run_name`."""
CONTINUES = "pipeline.continues"
"""Tag: id of the earlier run of the same name that failed. Stages that it had finished are below that one."""
LAST_STAGES = "pipeline.last_stages"
"""Tag that the exit handler sets: stages without which the pipeline has not succeeded."""
FAILED_STAGES, MISSING_STAGES = "pipeline.failed", "pipeline.missing"


def open_pipeline_run(server: "MlflowClient", experiment: str, name: str, params: Mapping[str, str]) -> str:
    """Id of the run, new or opened again. One that has failed or was cancelled stays as it is: a new one follows it."""
    from mlflow.entities import Param

    earlier = find_pipeline_run(server, experiment, name)
    if earlier and earlier.info.status not in ("FAILED", "KILLED"):
        reopen(server, earlier)
        if LAST_STAGES in earlier.data.tags:
            server.delete_tag(earlier.info.run_id, LAST_STAGES)
        return str(earlier.info.run_id)
    tags = {"mlflow.runName": name, PIPELINE: name}
    if earlier:
        tags[CONTINUES] = earlier.info.run_id
    run_id: str = server.create_run(experiment, tags=tags).info.run_id
    server.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
    return run_id


def find_pipeline_run(server: "MlflowClient", experiment: str, name: str) -> "Run | None":
    """The newest run of this name."""
    newest = _pipeline_runs(server, experiment, name)
    return newest[0] if newest else None


def reopen(server: "MlflowClient", run: "Run") -> None:
    if run.info.status != "RUNNING":
        server.update_run(run.info.run_id, "RUNNING")


def close_pipeline_run(server: "MlflowClient", run: "Run", last_stages: Sequence[str], outcome: Outcome | None) -> str:
    """Closes the run as the exit handler has found it, or else by its stages; says what became of it in a line.

    A stage that was cut off without a word is closed as well.
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
    """A stage has ended. Where the exit handler has run before it, this closes the pipeline's run by its stages."""
    run = server.get_run(run_id)
    if LAST_STAGES not in run.data.tags:
        return
    failed, missing = _unfinished(server, run, run.data.tags[LAST_STAGES].split())
    running = [stage for stage in _newest(server, run).values() if stage.info.status == "RUNNING"]
    if failed:
        server.set_terminated(run_id, "FAILED")
    elif not missing and not running:
        server.set_terminated(run_id, "FINISHED")


def _unfinished(server: "MlflowClient", run: "Run", last_stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stages that have failed, and last ones that have never finished; noted as tags of the run.

    A last stage that came from the cache has finished below an earlier run of the same name.
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
    return list(
        server.search_runs(
            [experiment], f"tags.`{PIPELINE}` = '{name}'", order_by=["attributes.start_time DESC"]
        )
    )  # fmt: skip


def _newest(server: "MlflowClient", run: "Run", *, finished: bool = False) -> dict[str, "Run"]:
    """The newest run of each stage, or of each that has finished, by name."""
    of_it = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'" + (" AND attributes.status = 'FINISHED'" * finished)
    stages = server.search_runs([run.info.experiment_id], of_it, order_by=["attributes.start_time ASC"])
    return {stage.info.run_name: stage for stage in stages}
