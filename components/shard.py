"""Decodes every clip once and writes shards that training reads."""

from components.image import component


@component()
def shard(
    raw: str,
    root: str,
    datasets: list[str],
    num_frames: int,
    short_side: int,
    tracking: dict[str, str],
    code_version: str,
) -> dict[str, str]:
    """Returns the URI of each dataset's shards by name."""
    from model.data.build import Settings
    from model.data.commit import build_shards
    from model.data.examine import Form
    from model.data.statistics import statistics
    from model.evaluation.dataset_report import publish
    from model.tracking import stage

    facts = {"num_frames": num_frames, "short_side": short_side, "code_version": code_version}
    with stage("shard", tracking, facts) as tracked:
        form = Form(num_frames=num_frames, short_side=short_side)
        uris = {name: build_shards(Settings(raw=raw, root=root, dataset=name, form=form)) for name in datasets}
        for uri in uris.values():
            publish(statistics(uri), tracked)
        tracked.tags({f"data_digest.{name}": uri.rpartition("@")[2] for name, uri in uris.items()})
    return uris
