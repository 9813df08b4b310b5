"""The format of a stored clip: a JSON file and its frames, or its original file, in a tar shard.

    00001234.json      annotation, properties of the source, numbers of the stored frames, lengths of the next files
    00001234.00.jpg …  F uniformly spaced frames                                       (form "frames")
    00001234.mp4       the clip as published                                           (form "original")

A conversation is stored like a clip, with the files of all its videos and images one after another; `media` in the JSON
says which belong to which. In the form "original" they are 00001234.00.mp4, 00001234.01.png, ….

The files of a clip are contiguous, so one read fetches all of them, and the JSON gives the offset of each frame. `tar`
and WebDataset can read the shards.
"""

import hashlib
import json
import re
import tarfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa

from model.data.annotations import Annotation
from model.data.conversations import media_of
from model.errors import DataError

BLOCK = tarfile.BLOCKSIZE
INDEX, QUARANTINE, DATASET = "index.parquet", "quarantine.jsonl", "dataset.json"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # row number in the annotation file of the split
        ("video", pa.string()),
        ("text", pa.string()),
        ("label", pa.string()),
        ("references", pa.list_(pa.string())),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the first tar header of the clip in its shard
        ("length", pa.int64()),  # of all its files, including headers
        ("sha256", pa.binary(32)),  # of these bytes
        ("num_frames", pa.int32()),  # of the source, like the next five
        ("fps", pa.float32()),
        ("duration_s", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form in which clips are stored."""

    kind: str = "frames"
    """"frames", or "original" for the published file."""
    num_frames: int = 16
    """Uniformly spaced frames per clip, for "frames"."""
    short_side: int = 256
    """Shorter side of stored frames, in pixels. Smaller frames are not enlarged."""

    def __post_init__(self) -> None:
        if self.kind not in ("frames", "original"):
            raise DataError(f"the form must be frames or original, got {self.kind}.")


@dataclass(frozen=True, kw_only=True)
class StoredMedium:
    """A video or an image of a stored conversation."""

    kind: str
    """"video" or "image"."""
    files: int
    """Number of its files."""
    frames: list[int]
    """Frame number in the source of each stored frame; empty for the form "original"."""
    num_frames: int
    """Frames of the source."""


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """The stored data of one clip, or of all media of a conversation."""

    files: list[bytes]
    """JPEG frames, or the published files."""
    frames: list[int]
    """Frame number in the source of each stored frame; empty for the form "original", and for conversations."""
    num_frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    bytes: int
    """Size of the source files."""
    media: list[StoredMedium] | None = None
    """Videos and images of a conversation; None for a clip."""

    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_frames", "fps", "duration_s", "width", "height", "bytes")}


def encode_record(key: str, annotation: Annotation, clip: StoredClip) -> bytes:
    """The clip as a section of a tar file."""
    meta = {**asdict(annotation), **clip.facts(), "frames": clip.frames, "lengths": [len(data) for data in clip.files]}
    paths, numbers = [annotation.video], [f".{number:02d}" for number in range(len(clip.files))]
    is_original = not clip.frames
    if clip.media is not None:
        meta["media"] = [asdict(medium) for medium in clip.media]
        paths = [path for _, path in media_of(annotation.conversation)]
        is_original = not any(medium.frames for medium in clip.media)
    elif is_original:
        numbers = [""]
    suffixes = [_suffix(path) for path in paths] if is_original else [".jpg"] * len(clip.files)
    names = [key + number + suffix for number, suffix in zip(numbers, suffixes, strict=True)]
    members = [(f"{key}.json", json.dumps(meta, ensure_ascii=False).encode()), *zip(names, clip.files, strict=True)]
    return b"".join(_member(name, data) for name, data in members)


def _suffix(path: str) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".mp4"


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # without time and owner, so that the same clips give the same bytes
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


class Record:
    """A stored clip, parsed. Raises ValueError if the bytes are not a record."""

    def __init__(self, data: bytes) -> None:
        end = self.needed(data)
        self.meta: dict[str, Any] = json.loads(data[BLOCK:end])
        self.data, self.start = data, end + -end % BLOCK

    @property
    def annotation(self) -> Annotation:
        references = tuple(self.meta["references"])
        return Annotation(
            video=self.meta["video"], text=self.meta["text"], label=self.meta["label"], references=references
        )

    @cached_property
    def media(self) -> list[StoredMedium]:
        """The clip, or the videos and images of a conversation."""
        meta = self.meta
        if "media" in meta:
            return [StoredMedium(**medium) for medium in meta["media"]]
        files, frames = len(meta["lengths"]), meta["frames"]
        return [StoredMedium(kind="video", files=files, frames=frames, num_frames=meta["num_frames"])]

    def file(self, number: int) -> memoryview:
        """A stored frame, or an original file."""
        lengths = self.meta["lengths"]
        start = self.start + BLOCK + sum(length + -length % BLOCK + BLOCK for length in lengths[:number])
        return memoryview(self.data)[start : start + lengths[number]]

    @staticmethod
    def needed(head: bytes) -> int:
        """Number of bytes at the start of a record that hold its JSON file."""
        return BLOCK + int(head[124:135], 8)  # the size field of a tar header


class TarWriter:
    """Writes clips to tar files of about `limit` bytes, and records the position of each."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.rows: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None
        self.number = -1

    def add(self, key: str, annotation: Annotation, clip: StoredClip) -> None:
        if self.file is None or self.file.tell() > self.limit:
            self.close()
            self.number += 1
            self.file = self.path(self.number).open("wb")
        data = encode_record(key, annotation, clip)
        where = {"shard": self.number, "offset": self.file.tell(), "length": len(data)}
        row = {"key": key, **asdict(annotation), **where, "sha256": hashlib.sha256(data).digest(), **clip.facts()}
        self.rows.append(row)
        self.file.write(data)

    def path(self, number: int) -> Path:
        return self.folder / shard_name(number)

    def close(self) -> None:
        if self.file is not None:
            self.file.write(bytes(2 * BLOCK))  # the end of an archive
            self.file.close()
            self.file = None


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"
