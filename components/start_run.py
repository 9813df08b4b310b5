"""Opens the MLflow run of the pipeline, which is the parent of the runs of all stages."""

from components.image import component


@component()
def start_run(tracking_uri: str, experiment: str, run_name: str, source: str, root: str) -> dict[str, str]:
    """Returns the tracking settings of all stages. Continues the last run of the same `run_name`, unless it failed."""
    from model.data.download.http import redact_url
    from model.errors import exit_codes
    from model.registry import start_pipeline_run

    with exit_codes():
        start_pipeline_run(tracking_uri, experiment, run_name, {"source": redact_url(source), "root": root})
        return {"uri": tracking_uri, "experiment": experiment, "pipeline": run_name}
