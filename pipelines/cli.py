"""The command line `mplug`: data, train, evaluate, pipeline, demo. Each command is a call into the package."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from model.config import ConfigError
from model.exits import exit_codes

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", context_settings=HELP, pretty_exceptions_enable=False,
    help="mPLUG-Video: video-language pre-training on Youku-mPLUG, from clips to registered models.",
)  # fmt: skip
data = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Make, copy and shard datasets.")
pipeline = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Run or compile the pipeline.")
app.add_typer(data, name="data")
app.add_typer(pipeline, name="pipeline")

Config = Annotated[str, typer.Argument(help="Preset (`mplug presets` lists them) or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as dotted.key=value.")]
Partition = Annotated[str, typer.Option(help="i/n: the i-th of n equal shares of the work, from 1/n to n/n.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server. Empty: no tracking.")]


@data.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same corpus.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the number of clips; 1 gives about 2,250.")] = 1.0,
    workers: Annotated[int | None, typer.Option(help="Rendering processes. Default: one per core.")] = None,
) -> None:
    """Make a small Youku-mPLUG in the published format.

    Example: `mplug data synthesize corpus --scale 0.1`
    """
    from model.data.synthetic import synthesize as run

    print(run(out, seed=seed, scale=scale, workers=workers))


@data.command()
def download(
    source: Annotated[str, typer.Argument(help="Folder, s3:// URI, list of URLs, or modelscope://owner/name.")],
    root: Annotated[str, typer.Argument(help="Folder or s3:// URI to copy to.")],
    dataset: Annotated[str, typer.Option(help="Name below <root>/raw.")] = "youku-mplug",
    only: Annotated[
        list[str] | None, typer.Option(help="Only paths of this pattern, 'retrieval/*'; repeatable.")
    ] = None,
    partition: Partition = "1/1",
    threads: Annotated[int, typer.Option(min=1, help="Transfers at a time.")] = 16,
    rate_limit: Annotated[float, typer.Option(min=0, help="MB per second; 0 is no limit.")] = 0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries in a row without a byte of progress.")] = 6,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="Share of files that may fail.")] = 0.0,
) -> None:
    """Copy a dataset into object storage; prints its URI.

    A list is CSV or TSV with a column `url` (and `path`, `size`, `sha256` where known), JSON lines with the same keys,
    or one URL a line. An interrupted command goes on where it was, inside large files too; training may start on what
    is there (`mplug data shard --available`).

    Example: `mplug data download modelscope://modelscope/Youku-AliceMind s3://mplug/work --partition 3/64`
    """
    from model.data.download import Options
    from model.data.download import download as run
    from model.data.fetch import Policy

    index, count = parse_partition(partition)
    options = Options(
        only=only or (), index=index, count=count, threads=threads, rate=rate_limit * 1e6, max_failed=max_failed,
        policy=Policy(attempts=attempts),
    )  # fmt: skip
    print(run(source, root, dataset, options)[0])


@data.command()
def status(
    raw: Annotated[str, typer.Argument(help="Folder or URI of a raw dataset, complete or not.")],
) -> None:
    """Say what of a dataset has been downloaded, and why the rest has not.

    Example: `mplug data status s3://mplug/work/raw/youku-mplug`
    """
    from model.data.ledger import status as run

    found = run(raw)
    print(f"{found.files} files, {found.bytes / 1e9:.3f} GB done; {found.failed.total()} failed")
    for reason, count in found.failed.most_common():
        print(f"{count:10d} {reason}")
    for outcome in found.examples:
        print(f"  {outcome.path}: {outcome.reason}")


@data.command()
def verify(
    uri: Annotated[str, typer.Argument(help="Folder or URI of a raw or a sharded dataset.")],
    partition: Partition = "1/1",
) -> None:
    """Read a dataset again and compare every file (or clip) with the hash that was taken when it was written.

    Files that differ are marked, and the next download fetches them again.

    Example: `mplug data verify work/raw/youku-mplug`
    """
    from model import storage
    from model.data import download, shards
    from model.data.annotations import DataError
    from model.data.records import DATASET

    index, count = parse_partition(partition)
    is_sharded = storage.exists(storage.join(uri, DATASET))
    right, wrong = shards.verify(uri) if is_sharded else download.verify(uri, index=index, count=count)
    if wrong:
        raise DataError("\n".join(wrong))
    print(f"{right} as written")


@data.command()
def shard(
    raw: Annotated[str, typer.Argument(help="Folder or URI of the raw dataset.")],
    root: Annotated[str, typer.Argument(help="Folder or URI under which shards/ is written.")],
    dataset: Annotated[str, typer.Option(help="pretrain, classification, retrieval or captioning.")] = "pretrain",
    form: Annotated[str, typer.Option(help="frames, or original for the clips as published.")] = "frames",
    num_frames: Annotated[int, typer.Option(min=1, help="Frames stored per clip.")] = 16,
    short_side: Annotated[int, typer.Option(min=16, help="Shorter side of stored frames, in pixels.")] = 256,
    partition: Partition = "1/1",
    available: Annotated[
        bool, typer.Option("--available", help="Shard what is there; clips that are not are listed as missing.")
    ] = False,
    max_quarantined: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a split's clips that may be broken.")
    ] = 0.05,
    decoder: Annotated[str, typer.Option(help="pyav or decord.")] = "pyav",
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds after which decoding a clip is given up.")] = 60,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. Default: one per core.")] = None,
) -> None:
    """Decode every clip once and write shards; prints their URI.

    Many machines share the work: each runs `--partition i/n`, and the command without it puts the parts together. An
    interrupted command goes on where it was. Clips that cannot be decoded are listed with the reason.

    Example: `mplug data shard work/raw/youku-mplug work --dataset retrieval --short-side 72`
    """
    from model.data.build import Settings, build_parts, plan
    from model.data.commit import build_shards
    from model.data.examine import Form

    settings = Settings(
        raw=raw, root=root, dataset=dataset, form=Form(kind=form, num_frames=num_frames, short_side=short_side),
        decoder=decoder, deadline_s=deadline, available_only=available, max_quarantined=max_quarantined,
    )  # fmt: skip
    index, count = parse_partition(partition)
    if count > 1:
        build_parts(plan(settings), index=index, count=count, workers=workers)
    else:
        print(build_shards(settings, workers=workers))


@data.command()
def tokenizer(
    raw: Annotated[str, typer.Argument(help="Folder or URI of the raw dataset.")],
    root: Annotated[str, typer.Argument(help="Folder or URI under which models/tokenizer is written.")],
    vocab_size: Annotated[int, typer.Option(min=264, help="Tokens, 264 of them fixed.")] = 448,
) -> None:
    """Learn a GPT-3 style tokenizer on the titles; prints its URI.

    Example: `mplug data tokenizer work/raw/youku-mplug work`
    """
    from model.tasks.tokenizer import publish_tokenizer

    print(publish_tokenizer(raw, root, vocab_size))


@app.command()
def presets() -> None:
    """List the run configurations that come with the package.

    Example: `mplug presets`
    """
    from model.config import presets as known

    print(*known(), sep="\n")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="GPT-3 folder, image encoder, or trained model, as published.")],
    dest: Annotated[str, typer.Argument(help="Folder or s3:// URI to write; must not exist.")],
    decoder: Annotated[
        Path | None, typer.Option(help="A trained model's GPT-3 folder: tokenizer, number of heads.")
    ] = None,
    vision_heads: Annotated[int, typer.Option(min=1, help="Attention heads of the vision encoder.")] = 8,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize position embeddings to this image size.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Resize frame embeddings to this many frames.")] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON of a head's categories: a list, or name: number.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave out tensors of this name or pattern; repeatable.")
    ] = None,
) -> None:
    """Convert published weights into a folder that `from_pretrained` loads.

    What SOURCE is, its tensors tell: a ModelScope GPT-3 folder (also in tensor-parallel pieces) becomes a decoder, CLIP
    or a timm ViT a vision encoder, `1_3B_mp_rank_00_model_states.pt` a whole model. DEST/conversion.json lists what
    became of every tensor.

    Example: `mplug convert 1_3B_mp_rank_00_model_states.pt work/mplug-1.3b --decoder nlp_gpt3_text-generation_1.3B`
    """
    from model.mplug_video.conversion import convert_to
    from model.mplug_video.upstream_shapes import read_class_names

    conversion = convert_to(
        source, dest, decoder=decoder, vision_heads=vision_heads, image_size=image_size, num_frames=num_frames,
        class_names=read_class_names(class_names) if class_names else None, drop=drop or [],
    )  # fmt: skip
    print(conversion.summary(), file=sys.stderr)
    print(dest)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Training processes on this machine.")] = 1,
) -> None:
    """Train one run, on one process or several.

    Example: `mplug train tiny_pretraining --processes 2 data.shards=work/shards/pretrain@… model.decoder=work/models/…`
    """
    from components.launcher import launch
    from model.config import load

    load(config, overrides)  # refused here, before any process starts
    sys.exit(launch(config, overrides or [], processes))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or URI of a trained model.")],
    shards: Annotated[str, typer.Argument(help="Folder or URI of a sharded benchmark.")],
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    preset: Annotated[str, typer.Option(help="The task's preset, for a model that `mplug convert` made.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips per batch.")] = 32,
    out: Annotated[str, typer.Option(help="Where to write scores and predictions as JSON.")] = "",
    tracking_uri: TrackingUri = "",
) -> None:
    """Score a model on a benchmark; prints its metrics.

    Example: `mplug evaluate work/models/tiny-retrieval work/shards/retrieval@… --out scores.json`
    """
    from model.evaluation import runner

    evaluation = runner.evaluate(
        model,
        shards=shards,
        split=split,
        preset=preset,
        batch_size=batch_size,
        tracking={"uri": tracking_uri, "parent_run": ""},
    )
    if out:
        runner.save(evaluation, out)
    print(json.dumps(evaluation.scores, indent=1))


@pipeline.command("run")
def run_pipeline(
    source: Annotated[str, typer.Argument(help="Folder or URI of the dataset as published.")],
    root: Annotated[str, typer.Argument(help="Folder or s3:// URI under which everything is written.")],
    overrides: Overrides = None,
    tracking_uri: TrackingUri = "",
    folder: Annotated[Path, typer.Option(help="Where kfp keeps step outputs and its cache.")] = Path("kfp"),
    run_name: Annotated[str, typer.Option(help="Names the MLflow run.")] = "mplug-video",
    processes: Annotated[int, typer.Option(min=1, help="Processes of the pre-training.")] = 2,
) -> None:
    """Run the whole pipeline on this machine; finished stages are not run again.

    Example: `mplug pipeline run corpus s3://mplug/work --tracking-uri http://127.0.0.1:5000`
    """
    from pipelines.local import run

    arguments = {"source": source, "root": root, "tracking_uri": tracking_uri, "run_name": run_name}
    run(folder, {**arguments, "processes": processes, "overrides": overrides or []})


@pipeline.command("compile")
def compile_pipeline(
    out: Annotated[Path, typer.Argument(help="YAML file to write.")] = Path("mplug-video.yaml"),
) -> None:
    """Compile the pipeline for a cluster. $MPLUG_IMAGE names the image of every step.

    Example: `MPLUG_IMAGE=registry.example/mplug-python@sha256:… mplug pipeline compile mplug-video.yaml`
    """
    from kfp import compiler

    from pipelines.mplug_video import mplug_video

    compiler.Compiler().compile(mplug_video, str(out))
    print(out)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Everything the demo makes is kept here.")] = Path("demo"),
    scale: Annotated[float, typer.Option(help="Factor on the number of clips.")] = 1.0,
    overrides: Overrides = None,
) -> None:
    """The main job on this machine: synthetic clips, S3 server, pipeline, MLflow, report.

    Example: `mplug demo`
    """
    from pipelines.demo import run

    sys.exit(run(folder.resolve(), scale=scale, overrides=overrides or []))


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(help="The folder of a demo.")] = Path("demo"),
) -> None:
    """Open MLflow's page on what a demo made; Ctrl-C stops it.

    Example: `mplug ui`
    """
    from pipelines.demo import serve

    serve(folder.resolve())


def parse_partition(text: str) -> tuple[int, int]:
    """ "2/8" -> (1, 8)"""
    part, separator, count = text.partition("/")
    if not (separator and part.isdigit() and count.isdigit() and 1 <= int(part) <= int(count)):
        raise ConfigError(f"--partition must be i/n with i from 1 to n, got {text}.")
    return int(part) - 1, int(count)


def main() -> None:
    with exit_codes():
        app()
