"""Closes the pipeline's MLflow run with what became of its stages."""

from components.image import component


@component()
def finish_run(tracking_uri: str, experiment: str, run_name: str, last_stages: str) -> None:
    """The pipeline has succeeded where all its stages have, and the `last_stages` are among them.

    kfp's own PipelineTaskFinalStatus is known only to backends newer than the oldest that these pipelines are for.
    """
    from model.exits import exit_codes
    from model.registry import finish_pipeline_run

    with exit_codes():
        print(finish_pipeline_run(tracking_uri, experiment, run_name, last_stages.replace("_", "-").split()))
