"""Closes the pipeline's MLflow run with the status that the pipeline ended in."""

from kfp.dsl import PipelineTaskFinalStatus

from components.image import component


@component()
def finish_run(tracking_uri: str, experiment: str, run_name: str, status: PipelineTaskFinalStatus) -> None:
    from model.registry import finish_pipeline_run

    finish_pipeline_run(tracking_uri, experiment, run_name, succeeded=status.state == "SUCCEEDED")
