"""Closes the pipeline's MLflow run with the status that the pipeline ended in, and says there why."""

from kfp.dsl import PipelineTaskFinalStatus

from components.image import component


@component()
def finish_run(tracking_uri: str, experiment: str, run_name: str, status: PipelineTaskFinalStatus) -> None:
    from model.registry import finish_pipeline_run

    facts = {"job": status.pipeline_job_resource_name, "error": status.error_message}
    print(f"{run_name} has ended as {status.state}. {status.error_message or ''}")
    finish_pipeline_run(tracking_uri, experiment, run_name, status.state, facts)
