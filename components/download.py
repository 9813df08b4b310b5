"""Copies a published dataset, or a partition of it, into object storage."""

from components.image import component


@component()
def download(
    source: str, source_version: str, root: str, dataset: str, partition: str, tracking: dict[str, str],
    code_version: str,
) -> str:  # fmt: skip
    """Returns the URI of the raw data, <root>/raw/<dataset>. `partition` i/n downloads the i-th of n partitions."""
    from model.data.download.dataset import Options
    from model.data.download.dataset import download_dataset as run
    from model.data.download.http import redact_url
    from model.data.partition import parse_partition
    from model.tracking import stage

    facts = {"source": redact_url(source), "source_version": source_version, "partition": partition}
    with stage("download", tracking, {**facts, "code_version": code_version}) as tracked:
        index, count = parse_partition(partition)
        uri, done = run(source, root, dataset, Options(index=index, count=count))
        tracked.metrics(done)
        return uri
