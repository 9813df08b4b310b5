"""Tar shards of decoded frames with a Parquet index: `mplug data shard`.

    <root>/shards/<dataset>@<digest>/dataset.json                what it is, class names, counts
    <root>/shards/<dataset>@<digest>/<split>/shard-00000.tar     WebDataset-readable: KEY.00.jpg … KEY.json
    <root>/shards/<dataset>@<digest>/<split>/quarantine.json     clips that could not be decoded, with the reason
    <root>/shards/<dataset>@<digest>/<split>/index.parquet       written last: no index = no split

Each clip is decoded once, here, to F uniformly spaced JPEG frames: reading 4 of them costs a millisecond, where
decoding them from H.264 costs ten to a hundred. The digest names the content; published shards never change.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model import storage
from model.data.annotations import SPLITS, Annotation, DataError, read_annotations, read_class_names
from model.data.video import VideoError, decode
from model.manifest import cache_folder
from model.progress import progress

JPEG_QUALITY = 88
SHARD_BYTES = 256 * 2**20
TAR_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    jpegs: list[bytes]
    num_frames: int
    fps: float
    width: int
    height: int


def build_shards(
    raw: str,
    root: str,
    dataset: str,
    *,
    num_frames: int = 16,
    short_side: int = 256,
    max_quarantined: float = 0.05,
    workers: int | None = None,
) -> str:
    """Shards all splits of one dataset and returns their URI, <root>/shards/<dataset>@<digest>.

    Raises DataError where more than `max_quarantined` of a split's clips cannot be decoded: so many mean a broken
    download, not broken clips.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / dataset
        splits = [split for split in SPLITS if storage.exists(storage.join(raw, dataset, f"{split}.csv"))]
        if not splits:
            raise DataError(f"{storage.join(raw, dataset)} must hold a CSV for one of {', '.join(SPLITS)}; none found.")
        counts = {}
        for split in splits:
            annotations = read_annotations(raw, dataset, split)
            quarantine = _build_split(raw, annotations, local / split, (num_frames, short_side), workers)
            _refuse_broken(split, quarantine, len(annotations), max_quarantined)
            counts[split] = len(annotations) - len(quarantine)
        facts = {
            "dataset": dataset,
            "num_frames": num_frames,
            "short_side": short_side,
            "class_names": read_class_names(raw) if dataset == "classification" else [],
            "clips": counts,
        }
        (local / "dataset.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        uri = storage.join(root, "shards", f"{dataset}@{_digest(local)}")
        for path in sorted(local.rglob("*"), key=lambda path: (path.name == "index.parquet", path)):
            if path.is_file():
                storage.upload(path, storage.join(uri, path.relative_to(local).as_posix()))
    return uri


def _build_split(
    raw: str, annotations: list[Annotation], folder: Path, form: tuple[int, int], workers: int | None
) -> list[dict[str, str]]:
    """Writes one split; returns its quarantine."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, str]] = []
    writer = _TarWriter(folder)
    encode = partial(_encode, raw, *form)
    # spawn: forking a process that holds threads (boto3, torch) can deadlock
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        videos = [annotation.video for annotation in annotations]
        clips = pool.map(encode, videos, chunksize=8)
        encoded = progress(clips, total=len(videos), desc=f"sharding {folder.parent.name} {folder.name}", unit="clip")
        for number, (annotation, clip) in enumerate(zip(annotations, encoded, strict=True)):
            if isinstance(clip, str):
                quarantine.append({"video": annotation.video, "reason": clip})
            else:
                rows.append(writer.add(f"{number:08d}", annotation, clip))
    writer.close()
    (folder / "quarantine.json").write_text(json.dumps(quarantine, ensure_ascii=False, indent=1) + "\n")
    if rows:
        pq.write_table(pa.Table.from_pylist(rows), folder / "index.parquet")
    return quarantine


def _refuse_broken(split: str, quarantine: list[dict[str, str]], total: int, most: float) -> None:
    if len(quarantine) > most * total:
        first = quarantine[0]
        raise DataError(
            f"at most {most:.0%} of a split's clips may be unreadable, got {len(quarantine)} of {total} in {split}; "
            f"the first is {first['video']}: {first['reason']}."
        )


def _encode(raw: str, num_frames: int, short_side: int, video: str) -> _Encoded | str:
    """The clip's frames as JPEG, or the reason why there are none."""
    try:
        clip = decode(storage.read(storage.join(raw, video)), num_frames)
    except (VideoError, storage.NotFoundError) as error:
        return str(error)
    scale = short_side / min(clip.width, clip.height)
    size = (round(clip.width * scale), round(clip.height * scale))
    jpegs = []
    for frame in clip.frames:
        buffer = io.BytesIO()
        frame.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(buffer.getvalue())
    return _Encoded(jpegs=jpegs, num_frames=clip.num_frames, fps=clip.fps, width=clip.width, height=clip.height)


class _TarWriter:
    """Writes clips one after another and notes where each frame lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = -1
        self.tar: tarfile.TarFile | None = None

    def add(self, key: str, annotation: Annotation, clip: _Encoded) -> dict[str, Any]:
        if self.tar is None or self.tar.offset > SHARD_BYTES:
            self.close()
            self.number += 1
            self.tar = tarfile.open(self._path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        meta = json.dumps(asdict(annotation), ensure_ascii=False).encode()
        offsets = [self._write(f"{key}.{index:02d}.jpg", data) for index, data in enumerate(clip.jpegs)]
        self._write(f"{key}.json", meta)
        return {
            "key": key,
            **asdict(annotation),
            "shard": self.number,
            "offsets": offsets,
            "lengths": [len(data) for data in clip.jpegs],
            "sha256": hashlib.sha256(b"".join(clip.jpegs)).hexdigest(),
            "num_frames": clip.num_frames,
            "fps": clip.fps,
            "width": clip.width,
            "height": clip.height,
        }

    def _write(self, name: str, data: bytes) -> int:
        assert self.tar is not None
        info = tarfile.TarInfo(name)  # mtime 0, no owner: the same clips give the same bytes
        info.size = len(data)
        offset = self.tar.offset + TAR_BLOCK
        self.tar.addfile(info, io.BytesIO(data))
        return offset

    def _path(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.tar"

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


def _digest(folder: Path) -> str:
    """Names the content: form, annotations, and every clip's hash."""
    state = hashlib.sha256((folder / "dataset.json").read_bytes())
    for path in sorted(folder.rglob("index.parquet")):
        for row in pq.read_table(path).to_pylist():
            state.update(json.dumps(row, sort_keys=True).encode())
    return state.hexdigest()[:12]


class ShardReader:
    """Random access to one split: annotations by position, frames by position and frame number."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        index = storage.join(uri, "index.parquet")
        if not storage.exists(index):
            raise DataError(f"{uri} holds no index.parquet: not a split, or its upload did not finish.")
        table = pq.read_table(pa.BufferReader(storage.read(index)))
        self.rows: list[dict[str, Any]] = table.to_pylist()
        self.tars: dict[int, mmap] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def annotation(self, position: int) -> Annotation:
        row = self.rows[position]
        return Annotation(video=row["video"], text=row["text"], label=row["label"], references=tuple(row["references"]))

    def stored_frames(self, position: int) -> int:
        return len(self.rows[position]["offsets"])

    def frames(self, position: int, indices: list[int]) -> list[Image.Image]:
        """Decodes some of a clip's stored frames."""
        row = self.rows[position]
        tar = self._tar(row["shard"])
        spans = ((row["offsets"][index], row["lengths"][index]) for index in indices)
        return [Image.open(io.BytesIO(tar[start : start + length])).convert("RGB") for start, length in spans]

    def _tar(self, number: int) -> mmap:
        if number not in self.tars:
            with _local(self.uri, f"shard-{number:05d}.tar").open("rb") as file:
                self.tars[number] = mmap(file.fileno(), 0, access=ACCESS_READ)
        return self.tars[number]


def _local(uri: str, name: str) -> Path:
    """The shard as a local file; immutable, so a copy in the cache never goes stale."""
    if not storage.is_s3(uri):
        return Path(uri) / name
    path = cache_folder() / "shards" / hashlib.sha256(uri.encode()).hexdigest()[:24] / name
    if not path.exists():
        storage.download(storage.join(uri, name), path)
    return path


def quarantined(uri: str) -> Iterator[dict[str, str]]:
    """The clips of a split that could not be decoded."""
    yield from json.loads(storage.read(storage.join(uri, "quarantine.json")))


def describe(uri: str) -> dict[str, Any]:
    """dataset.json of a sharded dataset (the parent of its splits)."""
    facts: dict[str, Any] = json.loads(storage.read(storage.join(uri, "dataset.json")))
    return facts
