"""From a published dataset to a pre-trained model: download -> shards -> pre-training on many nodes."""

from typing import Any

from kfp import dsl

from components.download import download
from components.shard import shard
from components.train import train
from pipelines.placement import place, set_resources
from pipelines.tracked import JobParameters, call_step, inner_pipeline, returned, tracked_pipeline


class PretrainParameters(JobParameters):
    source: str
    """Folder, s3:// URI, list of URLs or modelscope://owner/name of the dataset as published."""
    decoder: str
    """Folder or URI of the language model, made by `mplug convert`."""
    source_version: str = ""
    """Version of the source; a new one copies changed files."""
    dataset: str = "youku-mplug"
    """Name of the dataset under <root>/raw."""
    partitions: list[str] = ["1/1"]
    """Partitions of download and decoding, each in a separate step: 1/8, 2/8 and so on."""
    config: str = "pretrain_1.3b"
    """Preset of the pre-training."""
    download_cpu: str = "4"
    """CPU of a download step, as a Kubernetes quantity."""
    download_memory: str = "8Gi"
    """Memory of a download step."""


@inner_pipeline("dataset")
def make_dataset(p: PretrainParameters, tracking: dict[str, str]) -> dict[str, str]:
    """Downloads and decodes in partitions, and joins them at the end."""
    raw = f"{p.root}/raw/{p.dataset}"
    stored = {"raw": raw, "raw_version": p.source_version, "datasets": ["pretrain"], "tracking": tracking}
    with dsl.ParallelFor(p.partitions, name="download shares") as partition:
        share = call_step(download, p, partition=partition, tracking=tracking)
        set_resources(place(share, p.cpu_image), cpu=p.download_cpu, memory=p.download_memory)
    with dsl.ParallelFor(p.partitions, name="decode shares") as partition:
        part = call_step(shard, p, partition=partition, **stored).after(share)
        set_resources(place(part, p.cpu_image), cpu=p.shard_cpu, memory=p.shard_memory)
    whole = call_step(shard, p, partition="1/1", **stored).after(part)
    set_resources(place(whole, p.cpu_image), cpu=p.download_cpu, memory=p.shard_memory)  # only joins the partitions
    return returned(whole)


@tracked_pipeline(
    "pretrain",
    "Pre-trains mPLUG-Video on a published dataset.",
    source="source",
    last_stages="{config}-scratch",
    run_name="pretrain",
    nodes=8,
)
def pretrain(p: PretrainParameters, tracking: Any) -> None:
    shards = make_dataset(p, tracking=tracking)
    trained = call_step(train, p, shards=shards.output, tokenizers={}, pretrained="", init="scratch", tracking=tracking)
    set_resources(place(trained, p.cpu_image), cpu=p.train_cpu, memory=p.train_memory)
