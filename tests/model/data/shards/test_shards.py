import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from model import storage
from model.data.annotations import read_annotations
from model.data.shards import build
from model.data.shards.build import ShardSettings, build_parts, plan_shards, read_quarantine
from model.data.shards.commit import build_shards, commit_shards
from model.data.shards.format import INDEX, SCHEMA, Form
from model.data.shards.reader import ShardReader, read_dataset_info, verify_shards
from model.errors import DataError, StorageError
from model.video import decode, open_clip

SMALL = Form(num_frames=4, short_side=64)


def settings(raw: Path, root: Path, **changes: object) -> ShardSettings:
    return ShardSettings(**{"raw": str(raw), "root": str(root), "dataset": "captioning", "form": SMALL, **changes})


def files(folder: str | Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_webdataset_reads_the_shards(shards: dict[str, str], corpus: Path) -> None:
    rows = read_annotations(str(corpus), "retrieval", "test")
    tar = Path(shards["retrieval"]) / "test" / "shard-00000.tar"
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [json.loads(sample["json"])["text"] for sample in samples] == [row.text for row in rows]
    assert {f"{frame:02d}.jpg" for frame in range(8)} <= set(samples[0])


def test_stored_frames_resemble_the_original_frames(shards: dict[str, str], corpus: Path) -> None:
    reader = ShardReader(shards["pretrain"] + "/train")
    record = reader.record(3)
    clip = decode((corpus / record.annotation.video).read_bytes(), 8)
    for stored, original in zip(reader.frames(record, record.meta["frames"]), clip.frames, strict=True):
        resized = original.resize(stored.shape[1::-1], Image.Resampling.BILINEAR)
        assert np.abs(stored.astype(float) - np.asarray(resized, float)).mean() < 4


def test_the_nearest_stored_frame_is_read(shards: dict[str, str]) -> None:
    reader = ShardReader(shards["pretrain"] + "/train")
    record = reader.record(0)
    stored = record.meta["frames"]
    wanted = [0, stored[2] + 1, record.meta["num_frames"] - 1]
    expected = reader.frames(record, [stored[0], stored[2], stored[-1]])
    assert all(map(np.array_equal, reader.frames(record, wanted), expected))


def test_original_clips_are_stored_byte_for_byte(corpus: Path, tmp_path: Path) -> None:
    uri = build_shards(settings(corpus, tmp_path, form=Form(kind="original")))
    reader = ShardReader(f"{uri}/val")
    for position, row in enumerate(read_annotations(str(corpus), "captioning", "val")):
        record = reader.record(position)
        data = (corpus / row.video).read_bytes()
        assert bytes(record.file(0)) == data
        assert record.annotation == row
        frame = next(open_clip(data).frames([7]))
        assert np.array_equal(reader.frames(record, [7])[0], frame)
        assert (record.meta["height"], record.meta["width"]) == frame.shape[:2]


@pytest.mark.parametrize(
    ("function", "error"), [("read", StorageError("no answer")), ("move", ZeroDivisionError("a bug"))]
)
def test_errors_of_sharding_threads_are_raised_unchanged(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    call = getattr(storage, function)

    def fail(uri: str, *arguments: str) -> object:
        if uri.endswith(("mp4", "tar")):
            raise error
        return call(uri, *arguments)

    monkeypatch.setattr(storage, function, fail)
    with pytest.raises(type(error), match=str(error)):
        build_shards(settings(corpus, tmp_path))


def test_the_index_has_metadata_and_hash_of_every_clip(shards: dict[str, str], corpus: Path) -> None:
    import hashlib

    folder = Path(shards["captioning"]) / "test"
    table = pq.read_table(folder / INDEX)
    assert table.schema.equals(SCHEMA)
    for row in table.to_pylist():
        tar = (folder / f"shard-{row['shard']:05d}.tar").read_bytes()
        assert hashlib.sha256(tar[row["offset"] : row["offset"] + row["length"]]).digest() == row["sha256"]
        assert row["bytes"] == (corpus / row["video"]).stat().st_size
        assert row["duration_s"] == pytest.approx(row["num_frames"] / row["fps"], abs=0.01)


def test_the_digest_identifies_the_content(shards: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    form = Form(num_frames=8, short_side=72)
    again = build_shards(settings(corpus, tmp_path, form=form), workers=1)
    other = build_shards(settings(corpus, tmp_path), workers=2)
    assert again.rpartition("@")[2] == shards["captioning"].rpartition("@")[2] != other.rpartition("@")[2]
    assert files(again) == files(shards["captioning"])


def test_partitions_in_any_order_give_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.PART_CLIPS, "frames", 3)
    monkeypatch.setattr(build, "SHARD_BYTES", 20_000)
    whole = build_shards(settings(corpus, tmp_path / "whole"))
    planned = plan_shards(settings(corpus, tmp_path / "parts"))
    build_parts(planned, index=2, count=3, workers=1)
    with pytest.raises(DataError, match="all 3 parts of train must exist, 2 are missing: 1, 2"):
        commit_shards(planned)
    for index in (1, 0, 1):
        build_parts(plan_shards(settings(corpus, tmp_path / "parts")), index=index, count=3, workers=1)
    parts = commit_shards(planned)
    assert files(parts) == files(whole)
    assert not (tmp_path / "parts" / "shards" / ".building" / "x").exists()
    reader = ShardReader(f"{parts}/train")
    assert len(reader.first) > 2
    assert list(reader.annotations()) == [reader.annotation(position) for position in range(len(reader))]
    assert [record.annotation for record in map(reader.record, range(len(reader)))] == list(reader.annotations())


def test_a_part_whose_clips_have_changed_is_built_again(corpus: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(corpus, raw)
    victim = raw / read_annotations(str(raw), "captioning", "val")[0].video
    data = victim.read_bytes()
    victim.write_bytes(b"")
    wanted = settings(raw, tmp_path / "out", max_quarantined=0.0)
    with pytest.raises(DataError, match=r"got 1 of \d+ in val \(1 empty\)"):
        build_shards(wanted)
    victim.write_bytes(data)
    assert not list(read_quarantine(build_shards(wanted) + "/val"))


def test_a_large_index_is_read_across_groups_and_shards(tmp_path: Path) -> None:
    """Shards that begin within a row group, end with one, or span several."""
    lengths = np.random.default_rng(0).integers(1, 9, 300_000) * 512
    shard = np.sort(np.random.default_rng(1).integers(0, 5, len(lengths)))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1])
    offsets = np.concatenate([np.cumsum(part) - part for part in np.split(lengths, starts[1:])])
    columns = {"shard": shard.astype("int32"), "offset": offsets, "length": lengths}
    filler = {name: pa.nulls(len(lengths), SCHEMA.field(name).type) for name in SCHEMA.names if name not in columns}
    pq.write_table(pa.table({**filler, **columns}).select(SCHEMA.names), tmp_path / INDEX, row_group_size=70_000)
    reader = ShardReader(str(tmp_path))
    for position in [*range(0, len(lengths), 997), *(starts - 1)[1:], *starts, len(lengths) - 1]:
        assert reader._place(int(position)) == (shard[position], offsets[position], lengths[position])


def test_a_dataset_describes_itself(shards: dict[str, str]) -> None:
    facts = read_dataset_info(shards["classification"])
    assert facts["class_names"][0] == "篮球"
    assert facts["clips"]["test"] == len(ShardReader(shards["classification"] + "/test"))


@pytest.fixture
def raw(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the captioning data whose first training clips are damaged."""
    copy = tmp_path / "raw"
    shutil.copytree(corpus, copy, ignore=lambda _, names: [name for name in names if name.startswith("pretrain")])
    (copy / "classname.json").write_text("{}")
    return copy


def rewrite(raw: Path, rows: list[str]) -> None:
    (raw / "captioning" / "train.csv").write_text("\n".join(["video_id:FILE,golden_caption", *rows]) + "\n", "utf-8")


def test_unreadable_clips_are_quarantined_not_replaced(raw: Path, tmp_path: Path) -> None:
    videos = [row.video for row in read_annotations(str(raw), "captioning", "train")][:6]
    kinds = {"empty": b"", "not_a_video": b"this is no video", "truncated": (raw / videos[2]).read_bytes()[:500]}
    for video, data in zip(videos, kinds.values(), strict=False):
        (raw / video).write_bytes(data)
    (raw / videos[3]).unlink()
    rewrite(raw, [f"{video},字" for video in [*videos, videos[5]]])
    uri = build_shards(settings(raw, tmp_path / "out", max_quarantined=0.6))
    found = list(read_quarantine(uri + "/train"))
    assert [item["reason"] for item in found] == [*kinds, "missing", "duplicate"]
    assert [item["row"] for item in found] == [0, 1, 2, 3, 6]
    assert found[-1]["detail"] == "row 5 has the same clip and text"
    assert [row.video for row in ShardReader(uri + "/train").annotations()] == videos[4:]
    assert read_dataset_info(uri)["quarantined"] == {"train": 5, "val": 0, "test": 0}


def test_too_many_broken_clips_stop_sharding(raw: Path, tmp_path: Path) -> None:
    videos = [row.video for row in read_annotations(str(raw), "captioning", "train")]
    (raw / videos[0]).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"at most 5% of a split's clips may be broken, got 1 of 8 in train \(1 empty\)"
    ):
        build_shards(settings(raw, tmp_path / "out"))


def test_missing_videos_can_be_left_out(raw: Path, tmp_path: Path) -> None:
    videos = [row.video for row in read_annotations(str(raw), "captioning", "train")]
    for video in videos[:-1]:
        (raw / video).unlink()
    uri = build_shards(settings(raw, tmp_path / "out", available_only=True))
    assert [row.video for row in ShardReader(uri + "/train").annotations()] == videos[-1:]
    assert {item["reason"] for item in read_quarantine(uri + "/train")} == {"missing"}


def test_a_split_without_downloaded_videos_is_empty(raw: Path, tmp_path: Path) -> None:
    for row in read_annotations(str(raw), "captioning", "val"):
        (raw / row.video).unlink()
    uri = build_shards(settings(raw, tmp_path / "out", available_only=True))
    assert len(ShardReader(uri + "/val")) == 0
    assert len(ShardReader(uri + "/train")) == 8
    assert verify_shards(uri) == (16, [])


def test_a_killed_commit_is_completed_unchanged(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.PART_CLIPS, "frames", 3)
    (raw / read_annotations(str(raw), "captioning", "train")[4].video).unlink()
    wanted, moved = settings(raw, tmp_path / "out", max_quarantined=0.2), []

    def dies(source: str, dest: str) -> None:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(dest)
        Path(dest).parent.mkdir(parents=True, exist_ok=True)
        Path(source).rename(dest)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "move", dies)
        with pytest.raises(KeyboardInterrupt):
            build_shards(wanted)
    lost = read_annotations(str(raw), "captioning", "train")[4].video
    shutil.copy(
        raw / read_annotations(str(raw), "captioning", "train")[0].video, raw / lost
    )  # it has been downloaded since
    uri = build_shards(wanted)
    assert [item["video"] for item in read_quarantine(uri + "/train")] == [lost]
    assert all(dest.startswith(uri) for dest in moved)
    assert verify_shards(uri)[1] == []


def test_verification_names_a_changed_clip(raw: Path, tmp_path: Path) -> None:
    uri = build_shards(settings(raw, tmp_path / "out"))
    _, start, length = ShardReader(uri + "/train")._place(2)
    with (Path(uri) / "train" / "shard-00000.tar").open("r+b") as file:
        file.seek(start + length - 600)
        file.write(b"\x01" * 8)
    (Path(uri) / "val" / "shard-00000.tar").unlink()
    right, wrong = verify_shards(uri)
    assert len([line for line in wrong if line.startswith("train 00000002")]) == 1
    assert len(wrong) == 1 + 8
    assert right == 8 - 1 + 8


def test_a_split_without_an_index_is_ignored(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "train" / "shard-00000.tar"), b"")
    with pytest.raises(DataError, match="not a split, or its build did not finish"):
        ShardReader(str(tmp_path / "train"))
