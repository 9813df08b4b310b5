"""The exit handler: stops the remaining jobs of a pipeline run, and closes its MLflow run."""

from components.image import component


@component()
def finish_run(tracking_uri: str, experiment: str, run_name: str, last_stages: str, namespace: str) -> str:
    """Returns the outcome of the run and the reasons of failed steps, which Kubeflow's page shows as the step's output.

    kfp's PipelineTaskFinalStatus does not report that a run was cancelled.
    """
    from components.jobs.run_end import end_run
    from model.errors import exit_codes
    from model.registry import finish_pipeline_run

    with exit_codes():
        stages = last_stages.replace("_", "-").split()
        outcome, reasons = end_run(namespace)
        message = "\n".join([finish_pipeline_run(tracking_uri, experiment, run_name, stages, outcome), *reasons])
        print(message)
        return message
