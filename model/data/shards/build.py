"""Decodes every clip once and writes shards for training: `mplug data shard`.

    <root>/shards/<dataset>@<digest>/dataset.json              form, class names, counts
    <root>/shards/<dataset>@<digest>/<split>/shard-00000.tar   clips, in the format of model/data/shards/format.py
    <root>/shards/<dataset>@<digest>/<split>/quarantine.jsonl  rows without a usable clip, each with a reason
    <root>/shards/<dataset>@<digest>/<split>/index.parquet     written last: a split without an index does not exist

The work is divided into parts of consecutive rows. A part depends only on its rows and clips. It is built below
<root>/shards/.building and is complete once its index exists, so any number of machines can build parts, be killed and
resume. Complete parts are joined by model/data/shards/commit.py. The digest identifies the content: a dataset is
immutable.
"""

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from model import storage
from model.data.annotations import (
    INSTRUCTION,
    SPLITS,
    Annotation,
    annotation_file,
    annotation_path,
    duplicates,
    hashed,
    iter_annotations,
    read_class_names,
)
from model.data.conversations import media_of
from model.data.prefetch import in_order
from model.data.shards.examine import Media, examine_clip, examine_conversation, limit_memory
from model.data.shards.format import INDEX, QUARANTINE, SCHEMA, Form, StoredClip, TarWriter, shard_name
from model.errors import DataError, NotFoundError
from model.progress import progress
from model.video import DEADLINE_S, DECODERS

PART_CLIPS = {"frames": 1024, "original": 256}
SHARD_BYTES = 256 * 2**20
COMMIT_MARKER = "commit.json"
"""File next to the parts: all parts were complete, and some shards were already moved. The parts are not rebuilt."""
READERS = 8
"""Threads that fetch clips."""
GRACE_S = 5.0
"""Time between a decoder's own deadline and its kill."""
EARLY_CHECK_CLIPS = 1024
"""Number of clips after which the share of broken ones is checked for the first time."""
VERSION = 1
"""Version of the stored format, which is part of the digest."""

Row = tuple[int, Annotation]
"""Row number, from 0, and its annotation."""


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Inputs and settings of a sharded dataset."""

    raw: str
    root: str
    dataset: str
    form: Form = field(default_factory=Form)
    decoder: str = "pyav"
    deadline_s: float = DEADLINE_S
    """Time limit for decoding one clip; the process is killed shortly after."""
    available_only: bool = False
    """Record clips that are not downloaded yet as missing, without counting them as broken."""
    max_quarantined: float = 0.05
    """Share of a split's clips that may be broken. A higher share indicates a broken download."""

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise DataError(f"the decoder must be one of {', '.join(DECODERS)}, got {self.decoder}.")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One annotation file."""

    name: str
    rows: int
    duplicates: dict[int, int] = field(repr=False)
    """Row -> the earlier row with the same content."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All parts of a dataset, and the folder where they are built."""

    settings: ShardSettings
    splits: list[Split]
    staging: str

    def count(self, split: Split) -> int:
        """Parts of a split."""
        return -(-split.rows // PART_CLIPS[self.settings.form.kind])


def plan_shards(settings: ShardSettings) -> ShardPlan:
    """Reads the annotation files. Raises DataError with one line per bad row."""
    names = [name for name in SPLITS if annotation_file(settings.raw, settings.dataset, name)]
    if not names:
        files = ", ".join(annotation_path(settings.dataset, name) for name in SPLITS)
        raise DataError(f"{settings.raw} must hold an annotation file ({files}); none found.")
    facts = [
        VERSION,
        settings.dataset,
        asdict(settings.form),
        settings.decoder,
        settings.deadline_s,
        settings.available_only,
        class_names(settings),
    ]
    state = hashlib.sha256(json.dumps(facts).encode())
    splits = []
    for name in names:
        hashes = array("Q")
        for row in iter_annotations(settings.raw, settings.dataset, name):
            hashes.append(hashed(json.dumps([row.video, row.text, row.label, row.references])))
        state.update(name.encode() + hashes.tobytes())
        splits.append(Split(name=name, rows=len(hashes), duplicates=duplicates(hashes)))
    staging = storage.join(settings.root, "shards", ".building", f"{settings.dataset}-{state.hexdigest()[:12]}")
    return ShardPlan(settings=settings, splits=splits, staging=staging)


def class_names(settings: ShardSettings) -> list[str]:
    """The categories of a classification dataset."""
    if settings.dataset != "classification":
        return []
    try:
        return read_class_names(settings.raw)
    except NotFoundError as error:
        raise DataError(f"a classification dataset must have its categories: {error}") from error


def build_parts(plan: ShardPlan, *, index: int = 0, count: int = 1, workers: int | None = None) -> None:
    """Builds every `count`-th part, starting with number `index`. Complete parts are kept."""
    if storage.exists(storage.join(plan.staging, COMMIT_MARKER)):
        return
    workers, settings = workers or os.cpu_count() or 1, plan.settings
    size = PART_CLIPS[settings.form.kind]
    total = sum(
        min(size, split.rows - start)
        for split in plan.splits
        for start in range(index * size, split.rows, count * size)
    )
    name = f"{index + 1}/{count}" if count > 1 else ""
    # spawn: forking a process with threads (boto3, torch) can deadlock
    pool = ProcessPool(workers, context=get_context("spawn"), initializer=limit_memory)
    bar: tqdm[Any] = progress(total=total, desc=f"sharding {settings.dataset} {name}".strip(), unit="clip")
    try:
        with ThreadPoolExecutor(READERS) as readers, bar:
            builder = PartBuilder(plan, pool, readers, ahead=2 * workers, done=bar.update)
            for split in plan.splits:
                builder.build(split, index, count)
    finally:
        pool.stop()
        pool.join()


@dataclass(frozen=True)
class PartBuilder:
    """Turns consecutive rows into tar shards, a quarantine list and an index."""

    plan: ShardPlan
    pool: ProcessPool
    readers: ThreadPoolExecutor
    ahead: int
    done: Callable[[int], object]

    def build(self, split: Split, index: int, count: int) -> None:
        """Builds the parts of one split that belong to this partition."""
        size, seen = PART_CLIPS[self.plan.settings.form.kind], 0
        finished = finished_parts(self.plan, split)
        broken = FailureBudget(self.plan.settings, split.name)
        rows = enumerate(iter_annotations(self.plan.settings.raw, self.plan.settings.dataset, split.name))
        for number, first in enumerate(rows):
            part = [first, *islice(rows, size - 1)]
            if number % count == index:
                uri = part_uri(self.plan, split, number)
                broken.add(self._part(split, uri, part, is_finished=uri in finished))
                seen += len(part)
                if seen >= EARLY_CHECK_CLIPS:
                    broken.check(seen)

    def _part(self, split: Split, uri: str, rows: list[Row], *, is_finished: bool) -> list[dict[str, Any]]:
        """Builds one part; returns its quarantine."""
        if is_finished:
            quarantine = list(read_quarantine(uri))
            # stored clips stay valid; broken ones may have been downloaded again since
            if part_index(uri).schema.metadata[b"inputs"].decode() == self._versions(rows, quarantine):
                self.done(len(rows))
                return quarantine
        with tempfile.TemporaryDirectory() as folder:
            writer = TarWriter(Path(folder), SHARD_BYTES)
            quarantine = []
            for (line, annotation), clip in zip(rows, self._examined(split, rows), strict=True):
                if isinstance(clip, StoredClip):
                    writer.add(f"{line:08d}", annotation, clip)
                else:
                    reason, detail = clip
                    quarantine.append({"video": annotation.video, "row": line, "reason": reason, "detail": detail})
                self.done(1)
            writer.close()
            facts = {"inputs": self._versions(rows, quarantine), "shards": str(writer.number + 1)}
            table = pa.Table.from_pylist(writer.rows, SCHEMA).replace_schema_metadata(facts)
            for shard in range(writer.number + 1):
                storage.move_in(writer.path(shard), storage.join(uri, shard_name(shard)))
            storage.write(storage.join(uri, QUARANTINE), quarantine_lines(quarantine))
            pq.write_table(table, Path(folder) / INDEX, compression="zstd")
            storage.move_in(Path(folder) / INDEX, storage.join(uri, INDEX))
        return quarantine

    def _versions(self, rows: list[Row], quarantine: list[dict[str, Any]]) -> str:
        """A hash that changes when a file of one of the quarantined rows changes or appears."""
        annotations = dict(rows)
        files = [
            path
            for item in quarantine
            if item["reason"] != "duplicate"
            for _, path in self._media(annotations[item["row"]])
        ]
        entries = self.readers.map(lambda file: storage.head(storage.join(self.plan.settings.raw, file)), files)
        return hashlib.sha256(json.dumps([entry.version if entry else "" for entry in entries]).encode()).hexdigest()

    def _media(self, annotation: Annotation) -> list[tuple[str, str]]:
        """(kind, path) of the clip of a row, or of all media of its conversation."""
        is_conversation = self.plan.settings.dataset == INSTRUCTION
        return media_of(annotation.conversation) if is_conversation else [("video", annotation.video)]

    def _examined(self, split: Split, rows: list[Row]) -> Iterator[StoredClip | tuple[str, str]]:
        """The stored clip or the error of each row, in order. Clips are fetched and decoded ahead."""
        fetched = in_order((self.readers.submit(self._fetch, split, *row) for row in rows), self.ahead)
        for future in in_order((self._decode(item.result()) for item in fetched), self.ahead):
            try:
                yield future.result()
            except TimeoutError:
                yield "timeout", f"it was not decoded within {self.plan.settings.deadline_s:.0f} s"
            except ProcessExpired as error:
                yield "crashed", f"the decoder ended with code {error.exitcode}"

    def _fetch(self, split: Split, line: int, annotation: Annotation) -> Media | tuple[str, str]:
        if (earlier := split.duplicates.get(line)) is not None:
            return "duplicate", f"row {earlier} has the same clip and text"
        media: Media = []
        for kind, path in self._media(annotation):
            try:
                media.append((kind, path, storage.read(storage.join(self.plan.settings.raw, path))))
            except NotFoundError:
                return "missing", "the file does not exist" if path == annotation.video else f"{path} does not exist"
        return media

    def _decode(self, fetched: Media | tuple[str, str]) -> "Future[StoredClip | tuple[str, str]]":
        settings = self.plan.settings
        if isinstance(fetched, list):
            is_conversation = settings.dataset == INSTRUCTION
            future: Future[StoredClip | tuple[str, str]] = self.pool.schedule(
                examine_conversation if is_conversation else examine_clip,
                args=[
                    fetched if is_conversation else fetched[0][2],
                    settings.form,
                    settings.decoder,
                    settings.deadline_s,
                ],
                timeout=settings.deadline_s * max(1, len(fetched)) + GRACE_S,
            )
        else:
            future = Future()
            future.set_result(fetched)
        return future


def part_uri(plan: ShardPlan, split: Split, number: int) -> str:
    return storage.join(plan.staging, split.name, f"part-{number:06d}")


def finished_parts(plan: ShardPlan, split: Split) -> set[str]:
    """URIs of the complete parts of a split. One listing, since there may be ten thousand."""
    base = storage.join(plan.staging, split.name)
    found = (entry.path.rpartition("/") for entry in storage.walk(base))
    return {storage.join(base, part) for part, _, name in found if name == INDEX}


def part_index(uri: str) -> pa.Table:
    """The index of one part. Its shards are numbered from 0."""
    return pq.read_table(pa.BufferReader(storage.read(storage.join(uri, INDEX))))


def quarantine_lines(quarantine: Iterable[dict[str, Any]]) -> bytes:
    """The format that `read_quarantine` reads."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in quarantine).encode()


def read_quarantine(uri: str) -> Iterator[dict[str, Any]]:
    """The quarantined rows of a part or a split: video, row, reason, detail."""
    for line in storage.read(storage.join(uri, QUARANTINE)).decode().splitlines():
        yield json.loads(line)


class FailureBudget:
    """Counts the broken clips of a split against the allowed share."""

    def __init__(self, settings: ShardSettings, split: str) -> None:
        self.settings, self.split = settings, split
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, quarantine: Iterable[dict[str, Any]]) -> None:
        for item in quarantine:
            reason = item["reason"]
            if reason != "duplicate" and not (reason == "missing" and self.settings.available_only):
                self.reasons[reason] += 1
                self.first = self.first or f"{item['video']}: {item['detail']}"

    def check(self, seen: int) -> None:
        """Raises DataError if more of `seen` clips are broken than allowed."""
        most, found = self.settings.max_quarantined, self.reasons.total()
        if found > most * seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"at most {most:.0%} of a split's clips may be broken, got {found} of {seen} in {self.split} "
                f"({counts}); the first is {self.first}. Download them again, or allow more with --max-quarantined."
            )
