"""Joins complete parts into a dataset: numbers their shards, joins their indices, computes the digest."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model import storage
from model.data.shards.build import (
    COMMIT_MARKER,
    FailureBudget,
    ShardPlan,
    ShardSettings,
    Split,
    build_parts,
    class_names,
    finished_parts,
    part_index,
    part_uri,
    plan_shards,
    quarantine_lines,
    read_quarantine,
)
from model.data.shards.format import DATASET, INDEX, QUARANTINE, SCHEMA, shard_name
from model.errors import DataError
from model.progress import progress

GROUP_ROWS = 2**16
MOVERS = 16


def build_shards(settings: ShardSettings, *, workers: int | None = None) -> str:
    """Builds missing parts, joins all of them and returns the URI, <root>/shards/<dataset>@<digest>."""
    planned = plan_shards(settings)
    build_parts(planned, workers=workers)
    return commit_shards(planned)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The joined parts of a split."""

    name: str
    clips: int
    quarantined: int
    digest: str
    """Hash of all clips and all quarantined rows, in order."""
    moves: list[tuple[str, str]]
    """Current URI of each shard, and its name in the dataset."""


def commit_shards(planned: ShardPlan) -> str:
    """Moves all parts into the dataset. Can be killed and repeated."""
    settings = planned.settings
    with tempfile.TemporaryDirectory() as folder:
        splits = [join_parts(planned, split, Path(folder) / split.name) for split in planned.splits]
        facts = {
            "dataset": settings.dataset,
            "form": asdict(settings.form),
            "class_names": class_names(settings),
            "clips": {split.name: split.clips for split in splits},
            "quarantined": {split.name: split.quarantined for split in splits},
            "sha256": {split.name: split.digest for split in splits},
        }
        described = json.dumps(facts, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"
        name = f"{settings.dataset}@{hashlib.sha256(described).hexdigest()[:12]}"
        uri = storage.join(settings.root, "shards", name)
        storage.write(storage.join(planned.staging, COMMIT_MARKER), described)
        moves = [(source, storage.join(uri, split.name, dest)) for split in splits for source, dest in split.moves]
        with ThreadPoolExecutor(MOVERS) as pool:
            moved = pool.map(lambda move: storage.move(*move), moves)
            for _ in progress(moved, total=len(moves), desc=f"naming {name}", unit="shard"):
                pass
        storage.write(storage.join(uri, DATASET), described)
        for file in (QUARANTINE, INDEX):
            for split in splits:
                storage.upload_file(Path(folder) / split.name / file, storage.join(uri, split.name, file))
    storage.remove(planned.staging)
    return uri


def join_parts(planned: ShardPlan, split: Split, folder: Path) -> Joined:
    """Joins the indices of all parts of a split in constant memory."""
    folder.mkdir()
    state, broken, clips, quarantined = hashlib.sha256(), FailureBudget(planned.settings, split.name), 0, 0
    moves: list[tuple[str, str]] = []
    group: list[pa.Table] = []
    with (
        pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd", use_dictionary=["label"]) as index,
        (folder / QUARANTINE).open("wb") as listed,
    ):
        for uri, part in _parts(planned, split):
            lost = list(read_quarantine(uri))
            shifted = pc.add(part["shard"], pa.scalar(len(moves), pa.int32()))
            group.append(part.set_column(SCHEMA.get_field_index("shard"), "shard", shifted).cast(SCHEMA))
            if sum(map(len, group)) >= GROUP_ROWS:
                index.write_table(pa.concat_tables(group))
                group = []
            state.update(b"".join(part["sha256"].to_pylist()))
            state.update(json.dumps([[item["row"], item["reason"]] for item in lost]).encode())
            moves += [
                (storage.join(uri, shard_name(number)), shard_name(len(moves) + number))
                for number in range(int(part.schema.metadata[b"shards"]))
            ]
            broken.add(lost)
            listed.write(quarantine_lines(lost))
            clips += len(part)
            quarantined += len(lost)
        if sum(map(len, group)):
            index.write_table(pa.concat_tables(group))
    broken.check(split.rows)
    return Joined(name=split.name, clips=clips, quarantined=quarantined, digest=state.hexdigest(), moves=moves)


def _parts(planned: ShardPlan, split: Split) -> Iterator[tuple[str, pa.Table]]:
    count, finished = planned.count(split), finished_parts(planned, split)
    uris = [part_uri(planned, split, number) for number in range(count)]
    missing = [str(number) for number, uri in enumerate(uris, start=1) if uri not in finished]
    if missing:
        raise DataError(
            f"all {count} parts of {split.name} must exist, {len(missing)} are missing: {', '.join(missing[:10])}. Run "
            "their partitions first."
        )
    for uri in uris:
        yield uri, part_index(uri)
