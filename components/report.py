"""Writes the report, which compares every task with chance and with the same model without pre-training."""

from kfp.dsl import HTML, Output

from components.image import component


@component()
def report(
    evaluations: list[str], root: str, tracking: dict[str, str], code_version: str, page: Output[HTML]
) -> str:  # fmt: skip
    """Returns the URI of report.html, which Kubeflow's page shows as well."""
    from pathlib import Path

    from model import storage
    from model.evaluation.report import publish_report
    from model.tracking import stage

    with stage("report", tracking, {"code_version": code_version}) as tracked:
        uri = publish_report(evaluations, root, tracking)
        tracked.tags({"report": uri})
        storage.download_file(uri, Path(page.path))
        return uri
