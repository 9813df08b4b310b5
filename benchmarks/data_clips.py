"""Clips like those of Youku, their shards, and interleaved timing, for the benchmarks of the data plane."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from model.config.schema import DataConfig
from model.data.loading.loader import ClipSource, Example
from model.data.shards.build import ShardSettings
from model.data.shards.commit import build_shards
from model.data.shards.format import Form
from model.data.shards.reader import ShardReader
from model.mplug_video.processing import MPlugVideoProcessor

SIZE, FRAMES, ROUNDS = 224, 8, 5
NOISE = 2
"""Noise level that gives bit rate and frame sizes of real clips (12 to 33 kB at 256 pixels, measured on 11 clips)."""
CONFIG = DataConfig(workers=0, augment_ops=0)
PROCESSOR = MPlugVideoProcessor(None, image_size=SIZE, num_frames=FRAMES)  # type: ignore[arg-type]
Variant = Callable[[int], object]
"""One variant; its argument, the number of the round, is the seed."""


def ratio(one: list[float], other: list[float]) -> float:
    """Time of `other` relative to this one: the median over rounds."""
    return round(statistics.median(b / a for a, b in zip(one, other, strict=True)), 3)


def interleaved(variants: dict[str, Variant], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every variant in every round. The first round is a warm-up and is dropped."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 1):
        for name, variant in variants.items():
            start = clock()
            variant(turn)
            if turn:
                taken[name].append(clock() - start)
    return taken


def encode_clip(path: Path, gop: int, seed: int, seconds: int) -> None:
    """640 x 360 pixels, 25 frames/s, x264 with B-frames."""
    rng = np.random.default_rng(seed)
    scene = Image.fromarray(rng.integers(70, 186, (45, 80, 3), dtype=np.uint8)).resize(
        (1280, 720), Image.Resampling.BICUBIC
    )
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        stream.options = {"preset": "medium", "crf": "23", "g": str(gop)}
        for index in range(25 * seconds):
            if index % 125 == 0:  # a cut every five seconds
                x, y, dx, dy = rng.integers(0, 640), rng.integers(0, 360), rng.integers(-4, 5), rng.integers(-3, 4)
            left, top = int(np.clip(x + dx * (index % 125), 0, 640)), int(np.clip(y + dy * (index % 125), 0, 360))
            pixels = np.asarray(scene.crop((left, top, left + 640, top + 360))).astype(np.int16)
            pixels += rng.integers(-NOISE, NOISE + 1, (360, 640, 1), dtype=np.int16)
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def corpus(folder: Path, gop: int, clips: int, seconds: int = 54) -> Path:
    """A raw pre-training dataset of `clips` clips."""
    (folder / "pretrain").mkdir(parents=True)
    for number in range(clips):
        encode_clip(folder / f"{number}.mp4", gop, number, seconds)
    rows = "".join(f"{number}.mp4,标题{number}\n" for number in range(clips))
    (folder / "pretrain" / "train.csv").write_text(f"video_id:FILE,title\n{rows}", encoding="utf-8")
    return folder


def repeated_corpus(folder: Path) -> Path:
    """600 rows over 8 clips of 10 s."""
    raw = corpus(folder / "raw", 48, 8, seconds=10)
    rows = "".join(f"{number % 8}.mp4,标题{number}\n" for number in range(600))
    (raw / "pretrain" / "train.csv").write_text(f"video_id:FILE,title\n{rows}", encoding="utf-8")
    return raw


def shard(raw: Path, root: str, kind: str) -> str:
    return build_shards(ShardSettings(raw=str(raw), root=root, dataset="pretrain", form=Form(kind=kind))) + "/train"


def source(split: str, decoder: str = "pyav") -> ClipSource:
    return ClipSource(reader=ShardReader(split, decoder=decoder), processor=PROCESSOR, augment=CONFIG, seed=1)


def collate(examples: list[Example]) -> dict[str, Any]:
    return {"frames": torch.stack([example.clip for example in examples])}
