"""Shards of conversations, which have any number of videos and images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.annotations import read_annotations
from model.data.conversations import media_of
from model.data.loading.loader import ClipSource
from model.data.shards.build import ShardSettings, read_quarantine
from model.data.shards.commit import build_shards
from model.data.shards.format import Form
from model.data.shards.reader import ShardReader, verify_shards
from model.errors import DataError
from model.mplug_owl_video import MplugOwlImageProcessor, MplugOwlProcessor
from model.video import decode

SIZE = {"height": 32, "width": 32}


def asked(question: str, **media: list[str]) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "好"}]
    return {"messages": turns, **media}


@pytest.fixture(scope="module")
def raw(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of the corpus, a wide image, a photo taken with a turned camera, and a broken image."""
    folder = tmp_path_factory.mktemp("conversations")
    for number, row in enumerate(read_annotations(str(corpus), "retrieval", "test")[:2]):
        (folder / f"{number}.mp4").write_bytes((corpus / row.video).read_bytes())
    Image.new("RGB", (120, 80), (200, 30, 30)).save(folder / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (90, 60)).save(folder / "turned.jpg", exif=turned)
    (folder / "broken.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:200])
    rows = [
        asked("<video>什么？", videos=["0.mp4"]),
        asked("<image><video>和<video>？", videos=["1.mp4", "0.mp4"], images=["wide.png"]),
        asked("你好"),
        asked("<image>", images=["turned.jpg"]),
        asked("<video><image>", videos=["0.mp4"], images=["broken.jpg"]),
        asked("<video><video>", videos=["0.mp4", "missing.mp4"]),
    ]
    (folder / "instruction").mkdir()
    (folder / "instruction" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture(scope="module", params=["frames", "original"])
def split(raw: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> str:
    form = Form(kind=request.param, num_frames=6, short_side=64)
    root = tmp_path_factory.mktemp("sharded")
    settings = ShardSettings(raw=str(raw), root=str(root), dataset="instruction", form=form, max_quarantined=0.5)
    return build_shards(settings, workers=1) + "/train"


def test_every_medium_of_a_conversation_is_stored(split: str, raw: Path) -> None:
    reader = ShardReader(split)
    kinds = [[medium.kind for medium in reader.record(position).media] for position in range(len(reader))]
    assert kinds == [["video"], ["image", "video", "video"], [], ["image"]]
    record = reader.record(1)
    assert media_of(record.annotation.conversation) == [("image", "wide.png"), ("video", "1.mp4"), ("video", "0.mp4")]
    for number, name in ((1, "1.mp4"), (2, "0.mp4")):
        clip = decode((raw / name).read_bytes(), 6)
        assert record.media[number].num_frames == clip.num_frames
        indices = record.media[number].frames or [0, clip.num_frames - 1]
        found = reader.frames(record, indices, number)
        if record.media[number].frames:
            expected = [np.asarray(frame.resize(found[0].shape[1::-1])) for frame in clip.frames]
            assert np.abs(np.stack(found).astype(float) - np.stack(expected)).mean() < 4
    assert np.abs(reader.frames(record, [0], 0)[0].astype(float) - (200, 30, 30)).mean() < 2
    assert reader.frames(reader.record(3), [0])[0].shape == (90, 60, 3)  # upright
    assert verify_shards(split.removesuffix("/train")) == (4, [])


def test_a_conversation_with_an_unusable_file_is_quarantined(split: str) -> None:
    lost = [(item["row"], item["reason"], item["detail"]) for item in read_quarantine(split)]
    assert [item[:2] for item in lost] == [(4, "unreadable"), (5, "missing")]
    assert lost[0][2].startswith("broken.jpg: ")
    assert lost[1][2] == "missing.mp4 does not exist"


@pytest.mark.parametrize("num_frames", [1, 4])
def test_examples_have_the_frames_of_videos_and_images(split: str, num_frames: int) -> None:
    processor = MplugOwlProcessor(
        MplugOwlImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE), None, 9, num_frames
    )
    source = ClipSource(reader=ShardReader(split), processor=processor)
    counts = [[len(medium) for medium in source.example((0, n), source.fetch(n)).media] for n in range(4)]
    assert counts == [[num_frames], [1, num_frames, num_frames], [], [1]]


def test_images_are_cropped_as_the_processor_does(split: str) -> None:
    processor = MplugOwlProcessor(MplugOwlImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE), None)
    reader = ShardReader(split)
    image = ClipSource(reader=reader, processor=processor).example((0, 1), reader.record(1)).media[0]
    (stored,) = reader.frames(reader.record(1), [0], 0)
    assert torch.allclose(processor.normalize(image[None])[0, :, 0], processor.preprocess([stored])[0], atol=1e-5)


def test_unusable_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "instruction").mkdir()
    lines = [asked("<video>"), asked("a"), asked("<video>", videos=["../a.mp4"]), {"text": "Human: a"}]
    text = io.StringIO()
    text.writelines(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "instruction" / "val.jsonl").write_text(text.getvalue() + "\n")
    with pytest.raises(DataError) as caught:
        read_annotations(str(tmp_path), "instruction", "val")
    found = [line.partition("val.jsonl ")[2] for line in str(caught.value).splitlines()]
    assert [line[:7] for line in found] == ["line 1:", "line 3:", "line 4:"]
    (tmp_path / "instruction" / "val.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="must be UTF-8, but it holds the byte 0xff"):
        read_annotations(str(tmp_path), "instruction", "val")
