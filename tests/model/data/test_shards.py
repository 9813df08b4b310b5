import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import storage
from model.data.annotations import DataError, read_annotations
from model.data.shards import ShardReader, build_shards, describe, quarantined
from model.data.video import decode


def test_shards_are_tar_files_that_webdataset_reads(shards: dict[str, str], corpus: Path) -> None:
    rows = read_annotations(str(corpus), "retrieval", "test")
    with tarfile.open(Path(shards["retrieval"]) / "test" / "shard-00000.tar") as tar:
        names = tar.getnames()
        groups = {name.partition(".")[0] for name in names}
        meta = json.load(tar.extractfile("00000000.json"))  # type: ignore[arg-type]
    assert len(groups) == len(rows)
    assert names[:9] == [*(f"00000000.{frame:02d}.jpg" for frame in range(8)), "00000000.json"]
    assert meta["text"] == rows[0].text


def test_stored_frames_look_like_the_clips_own(shards: dict[str, str], corpus: Path) -> None:
    reader = ShardReader(shards["pretrain"] + "/train")
    clip = decode((corpus / reader.annotation(3).video).read_bytes(), 8)
    for stored, original in zip(reader.frames(3, list(range(8))), clip.frames, strict=True):
        resized = original.resize(stored.size, Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(stored, float) - np.asarray(resized, float)).mean() < 4


def test_the_digest_names_the_content(shards: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    again = build_shards(str(corpus), str(tmp_path), "captioning", num_frames=8, short_side=72, workers=1)
    other = build_shards(str(corpus), str(tmp_path), "captioning", num_frames=4, short_side=72, workers=2)
    assert again.rpartition("@")[2] == shards["captioning"].rpartition("@")[2] != other.rpartition("@")[2]
    for path in Path(again).rglob("*"):
        if path.is_file():
            same = Path(shards["captioning"]) / path.relative_to(again)
            assert path.read_bytes() == same.read_bytes()


def test_a_dataset_describes_itself(shards: dict[str, str]) -> None:
    facts = describe(shards["classification"])
    assert facts["class_names"][0] == "篮球"
    assert facts["clips"]["test"] == len(ShardReader(shards["classification"] + "/test"))


@pytest.fixture
def raw(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the captioning data whose first training clips are damaged."""
    copy = tmp_path / "raw"
    shutil.copytree(corpus, copy, ignore=lambda _, names: [name for name in names if name.startswith("pretrain")])
    (copy / "classname.json").write_text("{}")
    return copy


def damage(raw: Path, count: int) -> list[str]:
    videos = [row.video for row in read_annotations(str(raw), "captioning", "train")][:count]
    rows = (raw / "captioning" / "train.csv").read_text(encoding="utf-8").splitlines()
    (raw / "captioning" / "train.csv").write_text("\n".join([rows[0], *rows[1:] * 5]) + "\n", encoding="utf-8")
    kinds = [b"", b"this is no video", (raw / videos[-1]).read_bytes()[:500]]
    for video, data in zip(videos, kinds, strict=False):
        (raw / video).write_bytes(data)
    return videos


def test_a_broken_clip_is_quarantined_with_its_reason_not_replaced(raw: Path, tmp_path: Path) -> None:
    lost = damage(raw, 1)
    rows = len(read_annotations(str(raw), "captioning", "train"))
    uri = build_shards(str(raw), str(tmp_path / "out"), "captioning", num_frames=4, short_side=64, max_quarantined=0.2)
    found = list(quarantined(uri + "/train"))
    assert {item["video"] for item in found} == set(lost)
    assert all(item["reason"] == "the file is empty" for item in found)
    assert len(ShardReader(uri + "/train")) + len(found) == rows


def test_many_broken_clips_stop_the_sharding(raw: Path, tmp_path: Path) -> None:
    damage(raw, 3)
    with pytest.raises(DataError, match="at most 5% of a split's clips may be unreadable"):
        build_shards(str(raw), str(tmp_path / "out"), "captioning", num_frames=4, short_side=64)


def test_a_split_without_its_index_does_not_count(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "train" / "shard-00000.tar"), b"")
    with pytest.raises(DataError, match="not a split, or its upload did not finish"):
        ShardReader(str(tmp_path / "train"))
