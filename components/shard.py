"""Decodes every clip once and writes shards for training."""

from kfp.dsl import Dataset, Output

from components.image import component


@component()
def shard(
    raw: str, raw_version: str, root: str, datasets: list[str], num_frames: int, short_side: int, partition: str,
    tracking: dict[str, str], code_version: str, stored: Output[Dataset],
) -> dict[str, str]:  # fmt: skip
    """Returns the URIs of the shards by dataset. `partition` i/n only builds the i-th of n partitions, without a URI.

    A preset in `datasets` stands for the dataset of its task. `raw_version` must change with the data.
    """
    from model.config.load import preset_dataset
    from model.data.partition import parse_partition
    from model.data.shards.build import ShardSettings, build_parts, plan_shards
    from model.data.shards.commit import build_shards
    from model.data.shards.format import Form
    from model.data.statistics import statistics
    from model.evaluation.dataset_report import publish_statistics
    from model.tracking import stage

    facts = {"num_frames": num_frames, "short_side": short_side, "partition": partition, "raw_version": raw_version}
    with stage("shard", tracking, {**facts, "code_version": code_version}) as tracked:
        form, (index, count) = Form(num_frames=num_frames, short_side=short_side), parse_partition(partition)
        wanted = {
            name: ShardSettings(raw=raw, root=root, dataset=name, form=form) for name in map(preset_dataset, datasets)
        }
        if count > 1:
            for settings in wanted.values():
                build_parts(plan_shards(settings), index=index, count=count)
            return {}
        uris = {name: build_shards(settings) for name, settings in wanted.items()}
        for uri in uris.values():
            publish_statistics(statistics(uri), tracked)
        tracked.tags({f"data_digest.{name}": uri.rpartition("@")[2] for name, uri in uris.items()})
        stored.uri = f"{root}/shards"
        stored.metadata.update(uris)
        return uris
