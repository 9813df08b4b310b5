"""Ends a run: stops what it has started and still runs, and closes its run in MLflow."""

from components.image import component


@component()
def finish_run(tracking_uri: str, experiment: str, run_name: str, last_stages: str, namespace: str) -> str:
    """Returns what became of the run, and why steps failed; Kubeflow's page shows it as the step's output.

    kfp's own PipelineTaskFinalStatus does not say that a run was cancelled.
    """
    from components.jobs.run_end import end_run
    from model.errors import exit_codes
    from model.registry import finish_pipeline_run

    with exit_codes():
        stages = last_stages.replace("_", "-").split()
        outcome, reasons = end_run(namespace)
        said = "\n".join([finish_pipeline_run(tracking_uri, experiment, run_name, stages, outcome), *reasons])
        print(said)
        return said
