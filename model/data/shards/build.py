"""Decodes every clip once and writes shards that training reads: `mplug data shard`.

    <root>/shards/<dataset>@<digest>/dataset.json              what it is, class names, counts
    <root>/shards/<dataset>@<digest>/<split>/shard-00000.tar   clips, as model/data/shards/format.py says
    <root>/shards/<dataset>@<digest>/<split>/quarantine.jsonl  rows whose clip is not in it, each with the reason
    <root>/shards/<dataset>@<digest>/<split>/index.parquet     written last: no index = no split

Work is done in parts of consecutive rows. A part is a function of its rows and clips alone, is built below
<root>/shards/.building, and counts once its own index is there: any number of machines may build parts, be killed and
go on. When all parts are there they become the dataset (model/data/shards/commit.py). The digest names the content; a
dataset never changes.
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
    SPLITS,
    Annotation,
    annotation_file,
    duplicates,
    hashed,
    iter_annotations,
    read_class_names,
)
from model.data.prefetch import in_order
from model.data.shards.examine import examine_clip, limit_memory
from model.data.shards.format import INDEX, QUARANTINE, SCHEMA, Form, StoredClip, TarWriter, shard_name
from model.data.video import DEADLINE_S, DECODERS
from model.errors import DataError, NotFoundError
from model.progress import progress

PART_CLIPS = {"frames": 1024, "original": 256}
SHARD_BYTES = 256 * 2**20
COMMIT_MARKER = "commit.json"
"""Beside the parts: they were whole, and some of their shards have been moved already. They stay as they are."""
READERS = 8
"""Threads that fetch clips."""
GRACE_S = 5.0
"""Between the deadline that a decoder keeps itself and the moment when it is killed."""
EARLY_CHECK_CLIPS = 1024
"""Clips after which a broken download is noticed before everything has been read."""
VERSION = 1
"""Of the stored form: another one is another plan."""

Row = tuple[int, Annotation]
"""Number of a row in its file, from 0, and what it says."""


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What a sharded dataset is made of."""

    raw: str
    root: str
    dataset: str
    form: Form = field(default_factory=Form)
    decoder: str = "pyav"
    deadline_s: float = DEADLINE_S
    """For reading one clip's frames; it is killed a moment later."""
    available_only: bool = False
    """Clips that are not there yet are listed as missing and do not count as broken."""
    max_quarantined: float = 0.05
    """Share of a split's clips that may be broken. So many mean a broken download, not broken clips."""

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise DataError(f"the decoder must be one of {', '.join(DECODERS)}, got {self.decoder}.")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One annotation file, read once."""

    name: str
    rows: int
    duplicates: dict[int, int] = field(repr=False)
    """Row -> the earlier row that says the same."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """All parts of a dataset and where they are built."""

    settings: ShardSettings
    splits: list[Split]
    staging: str

    def count(self, split: Split) -> int:
        """Parts of a split."""
        return -(-split.rows // PART_CLIPS[self.settings.form.kind])


def plan_shards(settings: ShardSettings) -> ShardPlan:
    """Reads the annotation files. Raises DataError for every bad row of them."""
    names = [name for name in SPLITS if annotation_file(settings.raw, settings.dataset, name)]
    if not names:
        where = storage.join(settings.raw, settings.dataset)
        raise DataError(f"{where} must hold a CSV for one of {', '.join(SPLITS)}; none found.")
    facts = [
        VERSION, settings.dataset, asdict(settings.form), settings.decoder, settings.deadline_s,
        settings.available_only, class_names(settings),
    ]  # fmt: skip
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
    """Builds every `count`-th part, beginning with number `index`; those that are there already stay."""
    if storage.exists(storage.join(plan.staging, COMMIT_MARKER)):
        return
    workers, settings = workers or os.cpu_count() or 1, plan.settings
    size = PART_CLIPS[settings.form.kind]
    total = sum(min(size, split.rows - start) for split in plan.splits for start in range(0, split.rows, size)
                if start // size % count == index)  # fmt: skip
    name = f"{index + 1}/{count}" if count > 1 else ""
    # spawn: forking a process that holds threads (boto3, torch) can deadlock
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


class PartBuilder:
    """Turns consecutive rows into tar shards, a quarantine list and an index."""

    def __init__(
        self,
        plan: ShardPlan,
        pool: ProcessPool,
        readers: ThreadPoolExecutor,
        *,
        ahead: int,
        done: Callable[[int], object],
    ) -> None:
        self.plan, self.settings = plan, plan.settings
        self.pool, self.readers, self.ahead, self.done = pool, readers, ahead, done

    def build(self, split: Split, index: int, count: int) -> None:
        """The parts of one split whose turn it is."""
        size, seen = PART_CLIPS[self.settings.form.kind], 0
        finished = finished_parts(self.plan, split)
        broken = FailureBudget(self.settings, split.name)
        rows = enumerate(iter_annotations(self.settings.raw, self.settings.dataset, split.name))
        for number, first in enumerate(rows):
            part = [first, *islice(rows, size - 1)]
            if number % count == index:
                uri = part_uri(self.plan, split, number)
                broken.add(self._part(split, uri, part, is_finished=uri in finished))
                seen += len(part)
                if seen >= EARLY_CHECK_CLIPS:
                    broken.refuse(seen)

    def _part(self, split: Split, uri: str, rows: list[Row], *, is_finished: bool) -> list[dict[str, Any]]:
        """Builds one part; returns its quarantine."""
        quarantine: list[dict[str, Any]]
        if is_finished:
            quarantine = list(read_quarantine(uri))
            # what could be stored is; what could not may have been mended since
            if part_index(uri).schema.metadata[b"inputs"].decode() == self._versions(quarantine):
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
            facts = {"inputs": self._versions(quarantine), "shards": str(writer.number + 1)}
            table = pa.Table.from_pylist(writer.rows, SCHEMA).replace_schema_metadata(facts)
            for shard in range(writer.number + 1):
                storage.move_in(writer.path(shard), storage.join(uri, shard_name(shard)))
            storage.write(storage.join(uri, QUARANTINE), quarantine_lines(quarantine))
            pq.write_table(table, Path(folder) / INDEX, compression="zstd")
            storage.move_in(Path(folder) / INDEX, storage.join(uri, INDEX))
        return quarantine

    def _versions(self, quarantine: list[dict[str, Any]]) -> str:
        """Changes when one of the lost clips does, or appears."""
        videos = [item["video"] for item in quarantine if item["reason"] != "duplicate"]
        entries = self.readers.map(lambda video: storage.head(storage.join(self.settings.raw, video)), videos)
        return hashlib.sha256(json.dumps([entry.version if entry else "" for entry in entries]).encode()).hexdigest()

    def _examined(self, split: Split, rows: list[Row]) -> Iterator[StoredClip | tuple[str, str]]:
        """What became of each row, in order; clips are fetched and decoded ahead."""
        fetched = in_order((self.readers.submit(self._fetch, split, *row) for row in rows), self.ahead)
        for future in in_order((self._decode(item.result()) for item in fetched), self.ahead):
            try:
                yield future.result()
            except TimeoutError:
                yield "timeout", f"it was not decoded within {self.settings.deadline_s:.0f} s"
            except ProcessExpired as error:
                yield "crashed", f"the decoder ended with code {error.exitcode}"

    def _fetch(self, split: Split, line: int, annotation: Annotation) -> bytes | tuple[str, str]:
        if (earlier := split.duplicates.get(line)) is not None:
            return "duplicate", f"row {earlier} has the same clip and text"
        try:
            return storage.read(storage.join(self.settings.raw, annotation.video))
        except NotFoundError:
            return "missing", "there is no such file"

    def _decode(self, fetched: bytes | tuple[str, str]) -> "Future[StoredClip | tuple[str, str]]":
        settings = self.settings
        if isinstance(fetched, bytes):
            job = [fetched, settings.form, settings.decoder, settings.deadline_s]
            future: Future[StoredClip | tuple[str, str]] = self.pool.schedule(
                examine_clip, args=job, timeout=settings.deadline_s + GRACE_S
            )
        else:
            future = Future()
            future.set_result(fetched)
        return future


def part_uri(plan: ShardPlan, split: Split, number: int) -> str:
    return storage.join(plan.staging, split.name, f"part-{number:06d}")


def finished_parts(plan: ShardPlan, split: Split) -> set[str]:
    """URIs of the parts of a split that are whole: listed at once, for there may be ten thousand."""
    base = storage.join(plan.staging, split.name)
    found = (entry.path.rpartition("/") for entry in storage.walk(base))
    return {storage.join(base, part) for part, _, name in found if name == INDEX}


def part_index(uri: str) -> pa.Table:
    """The index of one part; the numbers of its shards begin at 0."""
    return pq.read_table(pa.BufferReader(storage.read(storage.join(uri, INDEX))))


def quarantine_lines(quarantine: Iterable[dict[str, Any]]) -> bytes:
    """As `read_quarantine` reads it."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in quarantine).encode()


def read_quarantine(uri: str) -> Iterator[dict[str, Any]]:
    """What a part or a split does not hold: video, row, reason, detail."""
    for line in storage.read(storage.join(uri, QUARANTINE)).decode().splitlines():
        yield json.loads(line)


class FailureBudget:
    """Counts the broken clips of a split. So many mean a broken download, not broken clips."""

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

    def refuse(self, seen: int) -> None:
        """Raises DataError where more of `seen` clips are broken than allowed."""
        most, found = self.settings.max_quarantined, self.reasons.total()
        if found > most * seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"at most {most:.0%} of a split's clips may be broken, got {found} of {seen} in {self.split} "
                f"({counts}); the first is {self.first}. Download them again, or allow more with --max-quarantined."
            )
