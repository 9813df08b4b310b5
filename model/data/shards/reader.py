"""Reads a sharded split: random access to clips on local disk, or on S3 by ranged requests.

Opening a split loads one number per clip, 40 MB for ten million. The rest of the metadata is read with the clip.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from model import storage
from model.data.annotations import Annotation
from model.data.cache import Cache
from model.data.shards.format import BLOCK, DATASET, INDEX, Record, StoredMedium, shard_name
from model.errors import DataError, NotFoundError
from model.progress import progress
from model.video import DEADLINE_S, Pixels, VideoError, open_clip, open_image

HEAD = 4096
"""Bytes that almost always include the JSON file of a record."""
PIECE = 2**18
"""Bytes per request. SeaweedFS uses 0.8 ms of CPU time per request up to this size, and 3 ms above it."""


class ShardReader:
    """Random access to one split. Thread-safe."""

    def __init__(
        self, uri: str, *, cache: Cache | None = None, decoder: str = "pyav", deadline_s: float = DEADLINE_S
    ) -> None:
        self.uri, self.cache, self.decoder, self.deadline_s = uri, cache, decoder, deadline_s
        if storage.head(storage.join(uri, INDEX)) is None:
            raise DataError(f"{uri} has no {INDEX}: it is not a split, or its build did not finish.")
        with self._index() as index:
            self.blocks, self.first, self.ends = _places(index)

    def _index(self) -> pq.ParquetFile:
        uri = storage.join(self.uri, INDEX)
        if storage.is_s3(uri):  # reads the columns of a row group in one request
            return pq.ParquetFile(pa.PythonFile(storage.RandomAccess(uri), mode="r"), pre_buffer=True)
        return pq.ParquetFile(uri)

    def __len__(self) -> int:
        return len(self.blocks)

    def record(self, position: int) -> Record:
        """A clip with its annotation."""
        return Record(self.read(position))

    def annotation(self, position: int) -> Annotation:
        """The annotation of one clip, without its frames."""
        shard, start, length = self._place(position)
        head = self._range(shard, start, min(HEAD, length))
        if len(head) < Record.needed(head):
            head = self._range(shard, start, Record.needed(head))
        return Record(head).annotation

    def annotations(self) -> Iterator[Annotation]:
        """All annotations in order."""
        for row in self.rows(["video", "text", "label", "references"]):
            yield Annotation(**{**row, "references": tuple(row["references"])})

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of the index in order."""
        for batch in self.batches(columns):
            yield from batch.to_pylist()

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of the index in batches of some thousand."""
        with self._index() as index:
            yield from index.iter_batches(batch_size=8192, columns=columns)

    def frames(self, record: Record, indices: list[int], number: int = 0) -> list[Pixels]:
        """Frames with these ascending numbers in the source, or the nearest stored ones. Raises VideoError.

        `number` is that of the video or image of a conversation.
        """
        media = record.media
        medium, first = media[number], sum(earlier.files for earlier in media[:number])
        if not medium.frames:
            data = bytes(record.file(first))
            if medium.kind == "image":
                return [open_image(data)]
            return list(open_clip(data, self.decoder, self.deadline_s).frames(indices))
        nearest = [_nearest(medium, index) for index in indices]
        decoded = {found: _pixels(record.file(first + found)) for found in set(nearest)}
        return [decoded[found] for found in nearest]

    @staticmethod
    def frame_numbers(medium: StoredMedium, indices: list[int]) -> list[int]:
        """The numbers in the source of the frames that `frames` returns."""
        return [medium.frames[_nearest(medium, index)] for index in indices] if medium.frames else indices

    def _place(self, position: int) -> tuple[int, int, int]:
        """Shard, offset and length of a clip."""
        shard = bisect.bisect_right(self.first, position) - 1
        start, after = int(self.blocks[position]), position + 1
        is_last = after == (self.first[shard + 1] if shard + 1 < len(self.first) else len(self.blocks))
        end = self.ends[shard] if is_last else int(self.blocks[after])
        return shard, start * BLOCK, (end - start) * BLOCK

    def read(self, position: int) -> bytes:
        """The bytes of a clip in its shard."""
        return self._range(*self._place(position))

    def _range(self, shard: int, start: int, length: int) -> bytes:
        uri = storage.join(self.uri, shard_name(shard))
        if self.cache is None:
            return _in_pieces(uri, start, length)
        return self.cache.get(f"{uri}@{start}+{length}", lambda: _in_pieces(uri, start, length))


def _nearest(medium: StoredMedium, index: int) -> int:
    """The number, among the stored frames of a medium, of the nearest one."""
    return min(range(medium.files), key=lambda n: abs(medium.frames[n] - index))


def _in_pieces(uri: str, start: int, length: int) -> bytes:
    """A range, read in requests of at most PIECE bytes."""
    if length <= PIECE or not storage.is_s3(uri):
        return storage.read_range(uri, start, length)
    return b"".join(storage.read_pieces(uri, start, length, PIECE))


def _places(index: pq.ParquetFile) -> tuple[NDArray[np.uint32], list[int], list[int]]:
    """Start of every clip in its shard, in tar blocks; and of every shard its first clip and its end, in blocks."""
    blocks = np.empty(index.metadata.num_rows, np.uint32)
    first: list[int] = []
    ends: list[int] = []
    position = 0
    for group in range(index.num_row_groups):
        # without threads: each of them would keep its own memory pool
        table = index.read_row_group(group, ["shard", "offset", "length"], use_threads=False)
        shards, offsets, lengths = (column.to_numpy() for column in table.columns)
        blocks[position : position + len(shards)] = offsets // BLOCK
        if not len(shards):
            continue
        heads = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist()]
        for head, tail in zip(heads, [*heads[1:], len(shards)], strict=True):
            if shards[head] == len(first):  # else the last shard of the previous row group continues
                first.append(position + head)
                ends.append(0)
            ends[-1] = int(offsets[tail - 1] + lengths[tail - 1]) // BLOCK
        position += len(shards)
    pa.default_memory_pool().release_unused()
    return blocks, first, ends


def _pixels(jpeg: memoryview) -> Pixels:
    try:
        return simplejpeg.decode_jpeg(jpeg)
    except ValueError as error:
        raise VideoError("damaged", f"a stored frame is not a complete JPEG: {error}") from error


def verify_shards(uri: str, *, index: int = 0, count: int = 1) -> tuple[int, list[str]]:
    """Hashes every `count`-th clip of a sharded dataset. Returns the number of intact clips, and a line for each
    damaged one."""
    right, wrong = 0, []
    for split, clips in read_dataset_info(uri)["clips"].items():
        reader = ShardReader(storage.join(uri, split))
        rows = reader.rows(["key", "video", "sha256"])
        for position, row in enumerate(progress(rows, total=clips, desc=f"verifying {split}", unit="clip")):
            if position % count != index:
                continue
            try:
                is_right = hashlib.sha256(reader.read(position)).digest() == row["sha256"]
            except NotFoundError:
                is_right = False
            right += is_right
            if not is_right:
                wrong.append(f"{split} {row['key']} {row['video']}: its bytes differ from those that were written")
    return right, wrong


def read_dataset_info(uri: str) -> dict[str, Any]:
    """dataset.json of a sharded dataset, which is next to its splits."""
    return json.loads(storage.read(storage.join(uri, DATASET)))
