"""Copies a published dataset into object storage."""

from components.image import component


@component()
def download(
    source: str, source_version: str, root: str, dataset: str, tracking: dict[str, str], code_version: str
) -> str:
    """Returns the URI of the raw data, <root>/raw/<dataset>."""
    from model.data.download import download as run
    from model.data.http import shown
    from model.tracking import stage

    with stage(
        "download", tracking, {"source": shown(source), "source_version": source_version, "code_version": code_version}
    ) as tracked:
        uri, facts = run(source, root, dataset)
        tracked.metrics(facts)
    return uri
