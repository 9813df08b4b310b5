"""Compares the data plane with alternatives, interleaved in one run.

    python -m benchmarks.data decode      clips/s per core: decord on the published file, both forms of shards
    python -m benchmarks.data storage     clips/s: shards on disk and on a real S3 server, and webdataset on both
    python -m benchmarks.data loading     batches/s with loader processes, no clip cache: S3 compared with disk
    python -m benchmarks.data batches     batches/s and shared memory: uint8, and float32 normalised in the loader
    python -m benchmarks.data index       ten million rows: written, merged, opened, sampled
    python -m benchmarks.data download    5,000 small and 20 large objects between two S3 servers, with s5cmd
    python -m benchmarks.data metrics     scores of the demo on both forms of shards; needs `make demo`
    python -m benchmarks.data             all seven

Needs `pip install -e '.[demo,bench]'`. Writes benchmarks/results/data.json. Ratios are medians over rounds.
"""

import argparse
import io
import json
import os
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import decord
import numpy as np
import torch
import webdataset
from PIL import Image
from torch.nn import functional as F

from benchmarks.data_clips import (
    CONFIG,
    FRAMES,
    PROCESSOR,
    SIZE,
    Variant,
    collate,
    corpus,
    interleaved,
    ratio,
    repeated_corpus,
    shard,
    source,
)
from benchmarks.data_loading import batches, loading
from benchmarks.data_metrics import metrics
from benchmarks.data_scale import download, index
from cli.services import BUCKET, object_storage
from model import storage
from model.config.schema import DataConfig
from model.data.loading.loader import ClipSource, Example, training_batches
from model.data.loading.sampler import BatchSampler
from model.data.shards.reader import ShardReader
from model.pixels import MEAN, STD, resized
from model.video import frame_indices

RESULTS = Path(__file__).parent / "results" / "data.json"
CLIPS = 6


# --- decode -----------------------------------------------------------------------------------------------------------


def plain_clip(path: Path, rng: random.Random) -> torch.Tensor:
    """decord on the published file: random frames, resize, random crop, normalise."""
    reader = decord.VideoReader(str(path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(frame_indices(len(reader), FRAMES, rng)).asnumpy())
    scale = 256 / min(frames.shape[1:3])
    size = [round(frames.shape[1] * scale), round(frames.shape[2] * scale)]
    clip = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    top, left = rng.randint(0, size[0] - SIZE), rng.randint(0, size[1] - SIZE)
    clip = clip[:, :, top : top + SIZE, left : left + SIZE].float() / 255
    return (
        ((clip - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).permute(1, 0, 2, 3).contiguous()
    )


def read(clips: ClipSource, epoch: int) -> None:
    for position in range(len(clips.reader)):
        PROCESSOR.normalize(collate([clips.example((epoch, position), clips.fetch(position))])["frames"])


def decode(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for gop in (48, 250):
        raw, count = corpus(folder / f"gop{gop}", gop, CLIPS), CLIPS
        splits = {kind: shard(raw, str(folder / f"out{gop}"), kind) for kind in ("frames", "original")}
        ours = {kind: source(split) for kind, split in splits.items()}
        ours["original, decord"] = source(splits["original"], "decord")
        paths: dict[str, Variant] = {"plain": partial(plain, raw, count)}
        paths |= {kind: partial(read, clips) for kind, clips in ours.items()}
        taken = interleaved(paths, time.process_time)
        found[f"gop {gop}"] = {
            "clips_per_core_second": {
                name: round(count / statistics.median(seconds), 2) for name, seconds in taken.items()
            },
            "over_plain": {kind: ratio(taken[kind], taken["plain"]) for kind in ours},
            "pixel_difference": {kind: difference(raw, split) for kind, split in splits.items()},
        }
    return found


def plain(raw: Path, count: int, turn: int) -> None:
    rng = random.Random(turn)
    for number in range(count):
        plain_clip(raw / f"{number}.mp4", rng)


def difference(raw: Path, split: str) -> dict[str, float]:
    """Difference in levels (of 255) between frames of a form and decord's frames, at the size of the model."""
    reader, gaps = ShardReader(split), []
    for position in range(len(reader)):
        record = reader.record(position)
        wanted = record.meta["frames"] or frame_indices(record.meta["num_frames"], FRAMES)
        theirs = decord.VideoReader(str(raw / record.meta["video"])).get_batch(wanted).asnumpy()
        ours = np.stack(reader.frames(record, wanted))
        at_size = [resized(torch.from_numpy(frames), SIZE).float() for frames in (ours, theirs)]
        gaps.append((at_size[0] - at_size[1]).abs())
    return {
        "mean": round(float(torch.stack([gap.mean() for gap in gaps]).mean()), 3),
        "p99": round(float(torch.cat([gap.flatten()[::97] for gap in gaps]).quantile(0.99)), 1),
    }


# --- storage ----------------------------------------------------------------------------------------------------------


def storage_rates(folder: Path) -> dict[str, Any]:
    raw = repeated_corpus(folder)
    with object_storage(folder / "s3"):
        local, remote = shard(raw, str(folder / "out"), "frames"), shard(raw, f"s3://{BUCKET}/out", "frames")
        torch.set_num_threads(1)
        decoded, records = (rates(local, remote, decode=decode) for decode in (True, False))
    size = sum(path.stat().st_size for path in Path(local).glob("*.tar")) / 600
    return {"clip_bytes": round(size), "decoded": decoded, "records_only": records}


def rates(local: str, remote: str, *, decode: bool) -> dict[str, Any]:
    ours = loaded if decode else fetched
    taken = interleaved(
        {
            "local": lambda _: ours(local),
            "s3": lambda _: ours(remote),
            "webdataset local": lambda _: by_webdataset(local, decode=decode),
            "webdataset s3": lambda _: by_webdataset(remote, decode=decode),
        },
        time.perf_counter,
    )
    return {
        "clips_per_s": {name: round(600 / statistics.median(seconds), 1) for name, seconds in taken.items()},
        "s3_over_local": ratio(taken["s3"], taken["local"]),
        "s3_over_webdataset_s3": ratio(taken["s3"], taken["webdataset s3"]),
        "local_over_webdataset_local": ratio(taken["local"], taken["webdataset local"]),
    }


def loaded(split: str) -> None:
    """Training batches in random order, 8 random frames per clip."""
    clips = source(split)
    order = BatchSampler(size=600, seed=1, batch_size=24, steps=25)
    for _ in training_batches(clips, order, collate, CONFIG):
        pass


def fetched(split: str) -> None:
    """The same without decoding."""
    clips = source(split)
    order = BatchSampler(size=600, seed=1, batch_size=24, steps=25)
    nothing = DataConfig(workers=0, read_ahead=CONFIG.read_ahead)
    object.__setattr__(clips, "example", lambda draw, record: Example(annotation=record.annotation, media=[], seed=""))
    for _ in training_batches(clips, order, lambda examples: {}, nothing):
        pass


def by_webdataset(split: str, *, decode: bool) -> None:
    """All samples in the order of the shards, streamed by webdataset and decoded by Pillow, in equal batches."""
    names = [entry.path for entry in storage.walk(split) if entry.path.endswith(".tar")]
    batch, count = [], 0
    for sample in webdataset.WebDataset([storage.join(split, name) for name in names], shardshuffle=False):
        count += 1
        if decode:
            wanted = [f"{index:02d}.jpg" for index in frame_indices(16, FRAMES, random.Random(count))]
            frames = [np.asarray(Image.open(io.BytesIO(sample[name])).convert("RGB")) for name in wanted]
            batch.append(resized(torch.from_numpy(np.stack(frames)), SIZE))
            if len(batch) == 24:
                torch.stack(batch)
                batch = []
    assert count == 600


def open_s3(url: str, *_: Any, **__: Any) -> Any:
    """webdataset does not support s3://; its users stream the body of boto3."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


JOBS = {
    "decode": decode,
    "storage": storage_rates,
    "loading": loading,
    "batches": batches,
    "index": index,
    "download": download,
    "metrics": metrics,
}


def main(names: list[str]) -> None:
    webdataset.gopen_schemes["s3"] = open_s3
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    results["machine"] = f"{cpu.partition(': ')[2]}, {os.cpu_count()} cores"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = JOBS[name](Path(folder))
        print(json.dumps({name: results[name]}, indent=1, ensure_ascii=False), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], help="default: all")
    main(parser.parse_args().jobs or list(JOBS))
