"""From a published dataset to a pre-trained model: download -> shards -> pre-training on many nodes."""

from kfp import dsl

from components.download import download
from components.finish_run import finish_run
from components.shard import shard
from components.start_run import start_run
from components.train import train
from pipelines.placement import SIZES, place, set_resources


@dsl.pipeline(name="mplug-video-dataset")
def make_dataset(
    source: str, source_version: str, root: str, dataset: str, partitions: list[str], num_frames: int, short_side: int,
    download_cpu: str, download_memory: str, shard_cpu: str, shard_memory: str, tracking: dict[str, str],
    code_version: str, image: str,
) -> dict[str, str]:  # fmt: skip
    """Download and decoding in shares, put together at the end. A pipeline of its own for the reason in finetune.py."""
    common = {"root": root, "tracking": tracking, "code_version": code_version}
    form = {"num_frames": num_frames, "short_side": short_side}
    stored = {"raw_version": source_version, "datasets": ["pretrain"], **form, **common}
    raw = f"{root}/raw/{dataset}"
    with dsl.ParallelFor(partitions, name="download shares") as partition:
        share = download(source=source, source_version=source_version, dataset=dataset, partition=partition, **common)
        set_resources(place(share, image), cpu=download_cpu, memory=download_memory)
    with dsl.ParallelFor(partitions, name="decode shares") as partition:
        part = shard(raw=raw, partition=partition, **stored).after(share)
        set_resources(place(part, image), cpu=shard_cpu, memory=shard_memory)
    whole = shard(raw=raw, partition="1/1", **stored).after(part)
    set_resources(place(whole, image), cpu=download_cpu, memory=shard_memory)  # which only puts the shares together
    return whole.output


@dsl.pipeline(name="mplug-video-pretrain-stages")
def pretrain_stages(
    source: str, source_version: str, root: str, dataset: str, partitions: list[str], num_frames: int, short_side: int,
    config: str, decoder: str, overrides: list[str], nodes: int, processes: int, namespace: str, deadline_hours: float,
    download_cpu: str, download_memory: str, shard_cpu: str, shard_memory: str, train_cpu: str, train_memory: str,
    tracking_uri: str, experiment: str, run_name: str, code_version: str, image: str, cpu_image: str,
) -> None:  # fmt: skip
    """The stages, each under the pipeline's MLflow run."""
    opened = start_run(
        tracking_uri=tracking_uri, experiment=experiment, run_name=run_name, source=source, root=root
    )  # fmt: skip
    place(opened, cpu_image).set_caching_options(False)
    common = {"root": root, "tracking": opened.output, "code_version": code_version}
    shards = make_dataset(
        source=source, source_version=source_version, dataset=dataset, partitions=partitions, num_frames=num_frames,
        short_side=short_side, download_cpu=download_cpu, download_memory=download_memory, shard_cpu=shard_cpu,
        shard_memory=shard_memory, image=cpu_image, **common,
    )  # fmt: skip
    trained = train(
        config=config, shards=shards.output, decoder=decoder, pretrained="", init="scratch",
        nodes=nodes, processes=processes, namespace=namespace, deadline_hours=deadline_hours, overrides=overrides,
        image=image, **common,
    )  # fmt: skip
    set_resources(place(trained, cpu_image), cpu=train_cpu, memory=train_memory)


@dsl.pipeline(name="mplug-video-pretrain", description="Pre-trains mPLUG-Video on a published dataset.")
def pretrain(
    source: str,
    decoder: str,
    code_version: str,
    image: str,
    cpu_image: str,
    root: str = "s3://mplug/work",
    source_version: str = "",
    dataset: str = "youku-mplug",
    partitions: list[str] = ["1/1"],  # noqa: B006 - kfp reads the default from the signature
    num_frames: int = 16,
    short_side: int = 256,
    config: str = "pretrain_1.3b",
    overrides: list[str] = [],  # noqa: B006
    nodes: int = 8,
    processes: int = 0,
    namespace: str = "mplug",
    deadline_hours: float = 0.0,
    download_cpu: str = SIZES["download_cpu"],
    download_memory: str = SIZES["download_memory"],
    shard_cpu: str = SIZES["shard_cpu"],
    shard_memory: str = SIZES["shard_memory"],
    train_cpu: str = SIZES["train_cpu"],
    train_memory: str = SIZES["train_memory"],
    tracking_uri: str = "http://mlflow.mplug.svc:5000",
    experiment: str = "mplug-video",
    run_name: str = "pretrain",
) -> None:
    """The stages, and a last word to MLflow however they end.

    Args:
        source: Folder, s3:// URI, list of URLs or modelscope://owner/name of the dataset as published.
        decoder: Folder or URI of the language model, as `mplug convert` makes it.
        code_version: Names the code; a new one runs every stage again.
        image: Image of the training pods.
        cpu_image: Image of the steps, none of which takes a GPU: the same, or the smaller one without CUDA.
        root: s3:// URI under which everything is written.
        source_version: Names the state of the source; a new one copies what has changed.
        dataset: Name of the dataset under <root>/raw.
        partitions: Shares of download and decoding, each a step of its own, as 1/8, 2/8 and so on.
        num_frames: Frames stored per clip.
        short_side: Height or width of stored frames, whichever is shorter, in pixels.
        config: Preset of the pre-training.
        overrides: dotted.key=value settings of the pre-training.
        nodes: Pods of the training job; 0 trains in the step itself.
        processes: Training processes per node; 0 is one per GPU of the cluster's shape of a pod.
        namespace: Where the training job runs.
        deadline_hours: Hours after which the training job is given up; 0 is never.
        download_cpu: Cores of a download step, as Kubernetes writes them.
        download_memory: Memory of a download step.
        shard_cpu: Cores of a step that decodes.
        shard_memory: Memory of a step that decodes.
        train_cpu: Cores of the step that follows the training job, or that trains itself with 0 nodes.
        train_memory: Memory of that step.
        tracking_uri: MLflow tracking server.
        experiment: MLflow experiment.
        run_name: Names the pipeline's MLflow run; a repeated run with the same name continues it.
    """
    last = finish_run(
        tracking_uri=tracking_uri,
        experiment=experiment,
        run_name=run_name,
        last_stages=f"{config}-scratch",
        namespace=namespace,
    )
    place(last, cpu_image).set_caching_options(False)
    with dsl.ExitHandler(last, name="stages"):
        pretrain_stages(
            source=source, source_version=source_version, root=root, dataset=dataset, partitions=partitions,
            num_frames=num_frames, short_side=short_side, config=config, decoder=decoder, overrides=overrides,
            nodes=nodes, processes=processes, namespace=namespace, deadline_hours=deadline_hours,
            download_cpu=download_cpu, download_memory=download_memory, shard_cpu=shard_cpu, shard_memory=shard_memory,
            train_cpu=train_cpu, train_memory=train_memory, tracking_uri=tracking_uri, experiment=experiment,
            run_name=run_name, code_version=code_version, image=image, cpu_image=cpu_image,
        )  # fmt: skip
