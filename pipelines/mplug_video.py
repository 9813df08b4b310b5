"""The whole platform as one pipeline: download -> shards -> pre-training -> three benchmarks -> registry and report.

The same definition runs in kfp's local runner (`mplug pipeline run`) and compiles for a cluster
(`mplug pipeline compile`). Stages pass URIs; data and weights stay in object storage.
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

DATASETS = ["pretrain", "classification", "retrieval", "captioning"]
BENCHMARKS = [
    {"config": f"tiny_{task}", "dataset": task, "init": init}
    for init in ("pretrained", "random")
    for task in ("classification", "retrieval", "captioning")
]
"""Each benchmark is fine-tuned twice: from the pre-trained model, and from fresh weights to show what that is worth."""


@dsl.pipeline(name="mplug-video-benchmarks")
def benchmarks(
    shards: dict[str, str], decoder: str, pretrained: str, root: str, overrides: list[str],
    tracking: dict[str, str], code_version: str,
) -> None:  # fmt: skip
    """Fine-tunes and judges every benchmark, registers the candidates and writes the report.

    A pipeline of its own: kfp 2.17's local runner hands a loop its item in place of every output of a sibling task,
    but leaves the inputs of the pipeline around it alone.
    """
    common = {"tracking": tracking, "code_version": code_version}
    # one process each, two at a time: on two cores this is faster than two processes one after the other
    with dsl.ParallelFor(BENCHMARKS, parallelism=2) as benchmark:
        tuned = train(
            config=benchmark.config, dataset=benchmark.dataset, shards=shards, root=root, decoder=decoder,
            pretrained=pretrained, init=benchmark.init, processes=1, overrides=overrides, **common,
        )  # fmt: skip
        judged = evaluate(trained=tuned.output, dataset=benchmark.dataset, shards=shards, **common)

    # one Collected per consumer: the compiler rewrites it in place
    register(evaluations=dsl.Collected(judged.outputs["Output"]), **common)
    report(evaluations=dsl.Collected(judged.outputs["Output"]), shards=shards, root=root, **common)


@dsl.pipeline(name="mplug-video-stages")
def stages(
    source: str, source_version: str, root: str, dataset: str, tracking_uri: str, experiment: str, run_name: str,
    code_version: str, processes: int, overrides: list[str], num_frames: int, short_side: int, vocab_size: int,
) -> None:  # fmt: skip
    """All stages of a run, each under the pipeline's MLflow run."""
    opened = start_run(
        tracking_uri=tracking_uri, experiment=experiment, run_name=run_name, source=source, root=root
    )  # fmt: skip
    opened.set_caching_options(False)  # a repeated pipeline opens its run again; the id stays, and with it the cache
    tracking = opened.output
    common = {"tracking": tracking, "code_version": code_version}

    raw = download(
        source=source, source_version=source_version, root=root, dataset=dataset, **common
    ).output  # fmt: skip
    shards = shard(
        raw=raw, root=root, datasets=DATASETS, num_frames=num_frames, short_side=short_side, **common
    ).output  # fmt: skip
    tokenizer = train_tokenizer(raw=raw, root=root, vocab_size=vocab_size, **common).output

    training = {"shards": shards, "root": root, "overrides": overrides, **common}
    decoder = train(
        config="tiny_decoder", dataset="pretrain", decoder=tokenizer, pretrained="", init="titles",
        processes=1, **training,
    ).output  # fmt: skip
    pretrained = train(
        config="tiny_pretraining", dataset="pretrain", decoder=decoder, pretrained="", init="random",
        processes=processes, **training,
    ).output  # fmt: skip
    benchmarks(decoder=decoder, pretrained=pretrained, **training)


@dsl.pipeline(name="mplug-video", description="Pre-trains mPLUG-Video, fine-tunes and judges it on three benchmarks.")
def mplug_video(
    source: str,
    root: str,
    tracking_uri: str,
    code_version: str,
    source_version: str = "",
    dataset: str = "youku-mplug",
    experiment: str = "mplug-video",
    run_name: str = "mplug-video",
    processes: int = 2,
    overrides: list[str] = [],  # noqa: B006 - kfp reads the default from the signature
    num_frames: int = 16,
    short_side: int = 72,
    vocab_size: int = 448,
) -> None:
    """The stages, and a last word to MLflow however they end.

    Args:
        source: Folder or s3:// URI of the dataset as published.
        root: Folder or s3:// URI under which everything is written.
        tracking_uri: MLflow tracking server.
        code_version: Names the code; a new one runs every stage again.
        source_version: Names the state of the source; a new one copies what has changed.
        dataset: Name of the dataset under <root>/raw.
        experiment: MLflow experiment.
        run_name: Names the pipeline's MLflow run; a repeated run with the same name continues it.
        processes: Training processes of the pre-training.
        overrides: dotted.key=value settings for every training stage.
        num_frames: Frames stored per clip.
        short_side: Height or width of stored frames, whichever is shorter, in pixels.
        vocab_size: Tokens of the tokenizer.
    """
    last = finish_run(tracking_uri=tracking_uri, experiment=experiment, run_name=run_name)
    last.set_caching_options(False)
    with dsl.ExitHandler(last, name="stages"):
        stages(
            source=source, source_version=source_version, root=root, dataset=dataset, tracking_uri=tracking_uri,
            experiment=experiment, run_name=run_name, code_version=code_version, processes=processes,
            overrides=overrides, num_frames=num_frames, short_side=short_side, vocab_size=vocab_size,
        )  # fmt: skip
