"""The whole platform as one pipeline: download -> shards -> pre-training -> three benchmarks -> registry and report.

The same definition runs in kfp's local runner (`mplug pipeline run`) and on a cluster (`mplug pipeline submit`).
Stages pass URIs; data and weights stay in object storage. At a scale that two cores can bear; the real sizes are in
pretrain.py, finetune.py and benchmark.py.
"""

from kfp import dsl

from components.download import download
from components.evaluate import evaluate
from components.finish_run import finish_run
from components.register import register
from components.report import report
from components.shard import shard
from components.start_run import start_run
from components.train import train
from components.train_tokenizer import train_tokenizer
from pipelines.placement import place, set_resources

DATASETS = ["pretrain", "classification", "retrieval", "captioning"]
BENCHMARKS = [
    {"config": f"tiny_{task}", "init": init}
    for init in ("pretrained", "random")
    for task in ("classification", "retrieval", "captioning")
]
"""Each benchmark is fine-tuned twice: from the pre-trained model, and from fresh weights to show what that is worth."""
IN_THE_STEP = {"nodes": 0, "namespace": "", "deadline_hours": 0.0}
"""Trains where the step runs, without a job of its own."""


@dsl.pipeline(name="mplug-video-benchmarks")
def benchmarks(
    shards: dict[str, str], decoder: str, pretrained: str, root: str, overrides: list[str], cpu: str, memory: str,
    tracking: dict[str, str], code_version: str, image: str,
) -> None:  # fmt: skip
    """Fine-tunes and judges every benchmark, registers the candidates and writes the report.

    A pipeline of its own: kfp 2.17's local runner hands a loop its item in place of every output of a sibling task,
    but leaves the inputs of the pipeline around it alone.
    """
    common = {"tracking": tracking, "code_version": code_version}
    # one process each, two at a time: on two cores this is faster than two processes one after the other
    with dsl.ParallelFor(BENCHMARKS, parallelism=2) as benchmark:
        tuned = train(
            config=benchmark.config, shards=shards, root=root, decoder=decoder,
            pretrained=pretrained, init=benchmark.init, processes=1, overrides=overrides, image=image, **IN_THE_STEP,
            **common,
        )  # fmt: skip
        set_resources(place(tuned, image), cpu=cpu, memory=memory)
        judged = evaluate(trained=tuned.output, config=benchmark.config, shards=shards, **common)
        set_resources(place(judged, image), cpu=cpu, memory=memory)

    # one Collected per consumer: the compiler rewrites it in place
    found = dsl.Collected(judged.outputs["Output"])
    place(register(evaluations=found, promote=False, **common), image)
    found = dsl.Collected(judged.outputs["Output"])
    set_resources(place(report(evaluations=found, shards=shards, root=root, **common), image), cpu=cpu, memory=memory)


@dsl.pipeline(name="mplug-video-stages")
def stages(
    source: str, source_version: str, root: str, dataset: str, tracking_uri: str, experiment: str, run_name: str,
    code_version: str, processes: int, overrides: list[str], num_frames: int, short_side: int, vocab_size: int,
    cpu: str, memory: str, image: str,
) -> None:  # fmt: skip
    """All stages of a run, each under the pipeline's MLflow run."""
    opened = start_run(
        tracking_uri=tracking_uri, experiment=experiment, run_name=run_name, source=source, root=root
    )  # fmt: skip
    place(opened, image)
    opened.set_caching_options(False)  # a repeated pipeline opens its run again; the id stays, and with it the cache
    tracking = opened.output
    common = {"tracking": tracking, "code_version": code_version}

    raw = download(
        source=source, source_version=source_version, root=root, dataset=dataset, partition="1/1", **common
    )  # fmt: skip
    shards = shard(
        raw=raw.output, raw_version=source_version, root=root, datasets=DATASETS, num_frames=num_frames,
        short_side=short_side, partition="1/1", **common,
    )  # fmt: skip
    tokenizer = train_tokenizer(raw=raw.output, raw_version=source_version, root=root, vocab_size=vocab_size, **common)

    training = {"shards": shards.output, "root": root, "overrides": overrides, "image": image, **common}
    decoder = train(
        config="tiny_decoder", decoder=tokenizer.output, pretrained="", init="titles",
        processes=1, **IN_THE_STEP, **training,
    )  # fmt: skip
    pretrained = train(
        config="tiny_pretraining", decoder=decoder.output, pretrained="", init="random",
        processes=processes, **IN_THE_STEP, **training,
    )  # fmt: skip
    for task in (raw, shards, tokenizer, decoder, pretrained):
        set_resources(place(task, image), cpu=cpu, memory=memory)
    benchmarks(decoder=decoder.output, pretrained=pretrained.output, cpu=cpu, memory=memory, **training)


@dsl.pipeline(name="mplug-video", description="Pre-trains mPLUG-Video, fine-tunes and judges it on three benchmarks.")
def mplug_video(
    source: str,
    root: str,
    tracking_uri: str,
    code_version: str,
    image: str,
    source_version: str = "",
    dataset: str = "youku-mplug",
    experiment: str = "mplug-video",
    run_name: str = "mplug-video",
    processes: int = 2,
    overrides: list[str] = [],  # noqa: B006 - kfp reads the default from the signature
    num_frames: int = 16,
    short_side: int = 72,
    vocab_size: int = 448,
    cpu: str = "500m",
    memory: str = "4Gi",
) -> None:
    """The stages, and a last word to MLflow however they end.

    Args:
        source: Folder or s3:// URI of the dataset as published.
        root: Folder or s3:// URI under which everything is written.
        tracking_uri: MLflow tracking server.
        code_version: Names the code; a new one runs every stage again.
        image: Image of every step.
        source_version: Names the state of the source; a new one copies what has changed.
        dataset: Name of the dataset under <root>/raw.
        experiment: MLflow experiment.
        run_name: Names the pipeline's MLflow run; a repeated run with the same name continues it.
        processes: Training processes of the pre-training.
        overrides: dotted.key=value settings for every training stage.
        num_frames: Frames stored per clip.
        short_side: Height or width of stored frames, whichever is shorter, in pixels.
        vocab_size: Tokens of the tokenizer.
        cpu: Cores of each step that computes, as Kubernetes writes them.
        memory: Memory of each step that computes.
    """
    last = finish_run(
        tracking_uri=tracking_uri,
        experiment=experiment,
        run_name=run_name,
        last_stages="register report",
        namespace="",
    )
    place(last, image).set_caching_options(False)
    with dsl.ExitHandler(last, name="stages"):
        stages(
            source=source, source_version=source_version, root=root, dataset=dataset, tracking_uri=tracking_uri,
            experiment=experiment, run_name=run_name, code_version=code_version, processes=processes,
            overrides=overrides, num_frames=num_frames, short_side=short_side, vocab_size=vocab_size,
            cpu=cpu, memory=memory, image=image,
        )  # fmt: skip
