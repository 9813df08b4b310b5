"""The commands `mplug data …`."""

from pathlib import Path
from typing import Annotated

import typer

from model.errors import ConfigError

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Generate, download, shard, verify and inspect datasets."
)
Dataset = Annotated[str, typer.Option(help="pretrain, classification, retrieval, captioning or instruction.")]
NumFrames = Annotated[int, typer.Option(min=1, help="Frames stored per clip.")]
ShortSide = Annotated[int, typer.Option(min=16, help="Shorter side of stored frames, in pixels.")]
Partition = Annotated[str, typer.Option(help="i/n: the i-th of n equal parts of the work, from 1/n to n/n.")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server. Empty: no tracking.")]


@data.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same corpus.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the number of clips; 1 gives about 5,400.")] = 1.0,
    workers: Annotated[int | None, typer.Option(help="Rendering processes. Default: one per core.")] = None,
) -> None:
    """Generate a small synthetic Youku-mPLUG in the published format.

    Example: `mplug data synthesize corpus --scale 0.1`
    """
    from model.data.synthetic.corpus import synthesize_corpus

    print(synthesize_corpus(out, seed=seed, scale=scale, workers=workers))


@data.command("download")
def download_command(
    source: Annotated[str, typer.Argument(help="Folder, s3:// URI, list of URLs, or modelscope://owner/name.")],
    root: Annotated[str, typer.Argument(help="Folder or s3:// URI to copy to.")],
    dataset: Annotated[str, typer.Option(help="Name below <root>/raw.")] = "youku-mplug",
    only: Annotated[
        list[str] | None, typer.Option(help="Only paths of this pattern, 'retrieval/*'; repeatable.")
    ] = None,
    partition: Partition = "1/1",
    threads: Annotated[int, typer.Option(min=1, help="Transfers at a time.")] = 32,
    rate_limit: Annotated[float, typer.Option(min=0, help="MB per second; 0: no limit.")] = 0,
    attempts: Annotated[int, typer.Option(min=1, help="Consecutive attempts without progress.")] = 6,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="Share of files that may fail.")] = 0.0,
) -> None:
    """Copy a dataset into object storage and print its URI.

    A list of URLs is CSV or TSV with a column `url` (and optionally `path`, `size`, `sha256`), JSON lines with the same
    keys, or one URL per line. An interrupted command resumes, also within large files. Training can start on partial
    downloads (`mplug data shard --available`).

    Example: `mplug data download modelscope://modelscope/Youku-AliceMind s3://mplug/work --partition 3/64`
    """
    from model.data.download.dataset import Options, download_dataset
    from model.data.download.fetch import RetryPolicy
    from model.data.partition import parse_partition

    index, count = parse_partition(partition)
    options = Options(
        only=only or (),
        index=index,
        count=count,
        threads=threads,
        rate=rate_limit * 1e6,
        max_failed=max_failed,
        policy=RetryPolicy(attempts=attempts),
    )
    print(download_dataset(source, root, dataset, options)[0])


@data.command()
def status(raw: Annotated[str, typer.Argument(help="Folder or URI of a raw dataset, complete or not.")]) -> None:
    """Show how much of a dataset is downloaded, and why other files failed.

    Example: `mplug data status s3://mplug/work/raw/youku-mplug`
    """
    from model.data.download.ledger import download_status

    found = download_status(raw)
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
    """Compare every file or clip of a dataset with the hash that was recorded when it was written.

    Damaged files of a raw dataset are recorded, and the next download fetches them again.

    Example: `mplug data verify work/raw/youku-mplug`
    """
    from model import storage
    from model.data.download.dataset import verify_download
    from model.data.partition import parse_partition
    from model.data.shards.format import DATASET
    from model.data.shards.reader import verify_shards
    from model.errors import DataError

    index, count = parse_partition(partition)
    verify_dataset = verify_shards if storage.exists(storage.join(uri, DATASET)) else verify_download
    intact, damaged = verify_dataset(uri, index=index, count=count)
    if damaged:
        raise DataError("\n".join(damaged))
    print(f"{intact} intact")


@data.command("shard")
def shard_command(
    raw: Annotated[str, typer.Argument(help="Folder or URI of the raw dataset.")],
    root: Annotated[str, typer.Argument(help="Folder or URI under which shards/ is written.")],
    dataset: Dataset = "pretrain",
    form: Annotated[str, typer.Option(help="frames, or original for the clips as published.")] = "frames",
    num_frames: NumFrames = 16,
    short_side: ShortSide = 256,
    partition: Partition = "1/1",
    available: Annotated[
        bool, typer.Option("--available", help="Shard the downloaded clips, and record the rest as missing.")
    ] = False,
    max_quarantined: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a split's clips that may be broken.")
    ] = 0.05,
    decoder: Annotated[str, typer.Option(help="pyav or decord.")] = "pyav",
    deadline: Annotated[float, typer.Option(min=0.1, help="Time limit for decoding a clip, in seconds.")] = 60,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. Default: one per core.")] = None,
) -> None:
    """Decode every clip once, write shards and print their URI.

    An instruction dataset holds conversations: `instruction/<split>.jsonl` in the format of ms-swift (`messages`),
    LLaMA-Factory (`conversations`) or mPLUG-Owl (`text`), with the paths of their `videos` and `images`.

    Machines can share the work: each runs `--partition i/n`, and a final command without it joins the parts. An
    interrupted command resumes. Clips that cannot be decoded are recorded with a reason.

    Example: `mplug data shard work/raw/youku-mplug work --dataset retrieval --short-side 72`
    """
    from model.data.partition import parse_partition
    from model.data.shards.build import ShardSettings, build_parts, plan_shards
    from model.data.shards.commit import build_shards
    from model.data.shards.format import Form

    settings = ShardSettings(
        raw=raw,
        root=root,
        dataset=dataset,
        form=Form(kind=form, num_frames=num_frames, short_side=short_side),
        decoder=decoder,
        deadline_s=deadline,
        available_only=available,
        max_quarantined=max_quarantined,
    )
    index, count = parse_partition(partition)
    if count > 1:
        build_parts(plan_shards(settings), index=index, count=count, workers=workers)
    else:
        print(build_shards(settings, workers=workers))


@data.command("import")
def import_command(
    videos: Annotated[str, typer.Argument(help="Folder or s3:// URI of the videos.")],
    table: Annotated[
        str, typer.Argument(help="CSV with columns video and text, and optionally label and split; or JSONL.")
    ],
    root: Annotated[str, typer.Argument(help="Folder or s3:// URI under which raw/ and shards/ are written.")],
    dataset: Dataset = "pretrain",
    name: Annotated[str, typer.Option(help="Name below <root>/raw.")] = "own",
    form: Annotated[str, typer.Option(help="frames, or original for the unchanged clips.")] = "frames",
    num_frames: NumFrames = 16,
    short_side: ShortSide = 256,
) -> None:
    """Import your own videos as a dataset and print the URI of its shards.

    The table has the path of each video relative to VIDEOS. Without a column `split`, val and test get 10 % of the
    videos each, always the same ones. All videos of a pre-training dataset are in train. For `--dataset instruction`
    the table is a JSONL file of conversations, in the format of ms-swift, LLaMA-Factory or mPLUG-Owl.

    Example: `mplug data import videos captions.csv work --dataset captioning`
    """
    import tempfile

    from model import storage
    from model.data.download.dataset import download_dataset
    from model.data.download.import_videos import ImportedVideos, read_rows
    from model.data.shards.build import ShardSettings
    from model.data.shards.commit import build_shards
    from model.data.shards.format import Form

    stored = Form(kind=form, num_frames=num_frames, short_side=short_side)
    rows = read_rows(table, videos, dataset)
    with tempfile.TemporaryDirectory() as folder:
        own = ImportedVideos(videos, rows, dataset, Path(folder))
        own.validate_same(storage.join(root, "raw", name))
        raw, _ = download_dataset(own, root, name)
    print(build_shards(ShardSettings(raw=raw, root=root, dataset=dataset, form=stored)))


@data.command()
def stats(
    shards: Annotated[str, typer.Argument(help="Folder or URI of a sharded dataset.")],
    out: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    tracking_uri: TrackingUri = "",
    experiment: Annotated[str, typer.Option(help="MLflow experiment.")] = "mplug-video",
) -> None:
    """Show statistics of a dataset: categories, durations, resolutions, sizes, titles, and quarantined clips.

    Example: `mplug data stats work/shards/classification@… --out stats.html`
    """
    from rich.console import Console

    from model.config.schema import TrackingConfig
    from model.data.statistics import statistics
    from model.evaluation.dataset_report import print_statistics, publish_statistics, statistics_page
    from model.tracking import tracked

    found = statistics(shards)
    print_statistics(found, Console(highlight=False))
    if out:
        out.write_text(statistics_page(found), encoding="utf-8")
    if tracking_uri:
        with tracked(TrackingConfig(uri=tracking_uri, experiment=experiment), f"stats-{found.name}") as run:
            run.tags({"data_digest": found.name.rpartition("@")[2]})
            publish_statistics(found, run)


@data.command()
def tokenizer(
    raw: Annotated[str, typer.Argument(help="Folder or URI of the raw dataset.")],
    root: Annotated[str, typer.Argument(help="Folder or URI under which models/ is written.")],
    vocab_size: Annotated[int, typer.Option(min=264, help="Tokens, 264 of them fixed.")] = 448,
    dataset: Dataset = "pretrain",
) -> None:
    """Train a GPT-3 style tokenizer on titles or conversations and print its URI.

    Example: `mplug data tokenizer work/raw/youku-mplug work`
    """
    from model.tasks.language_modeling import publish_tokenizer

    print(publish_tokenizer(raw, root, vocab_size, dataset))


@data.command()
def copy(
    source: Annotated[str, typer.Argument(help="Local file or s3:// URI.")],
    dest: Annotated[str, typer.Argument(help="s3:// URI or local file to write.")],
) -> None:
    """Copy one file into object storage, or out of it.

    Example: `mplug data copy s3://mplug/work/backups/mlflow-20261126T021700Z.dump mlflow.dump`
    """
    from model.storage import download_file, is_s3, upload_file

    if is_s3(source) == is_s3(dest):
        raise ConfigError(f"one of the two must be an s3:// URI and the other a file, got {source} and {dest}.")
    if is_s3(source):
        download_file(source, Path(dest))
    else:
        upload_file(Path(source), dest)
    print(dest)
