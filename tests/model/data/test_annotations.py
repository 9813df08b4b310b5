from pathlib import Path

import pytest

from model.data.annotations import Annotation, read_annotations
from model.errors import DataError


def write(root: Path, text: str, *, dataset: str = "pretrain", split: str = "train", encoding: str = "utf-8") -> str:
    path = root / dataset / f"{split}.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode(encoding))
    return str(root)


def test_commas_quotes_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    raw = write(tmp_path, 'video_id:FILE,title\na.mp4,"一，二,""三"""\n', encoding="utf-8-sig")
    assert read_annotations(raw, "pretrain", "train") == [Annotation(video="a.mp4", text='一，二,"三"')]


def test_references_are_a_list_literal_in_lower_case(tmp_path: Path) -> None:
    raw = write(
        tmp_path, "video_id:FILE,golden_caption\na.mp4,\"['一个MV', '二']\"\n", dataset="captioning", split="val"
    )
    (row,) = read_annotations(raw, "captioning", "val")
    assert row.references == ("一个mv", "二")


@pytest.mark.parametrize(
    "video", ["../outside.mp4", "/etc/passwd", "a/../../b.mp4", "a\\..\\b.mp4", "", "folder/", "a\x1bb.mp4"]
)
def test_a_path_outside_the_root_is_rejected_with_its_line(tmp_path: Path, video: str) -> None:
    raw = write(tmp_path, f"video_id:FILE,title\nok.mp4,好\n{video},坏\n")
    with pytest.raises(DataError, match=r"train\.csv line 3: the path of a video must stay below"):
        read_annotations(raw, "pretrain", "train")


def test_every_invalid_row_is_reported(tmp_path: Path) -> None:
    raw = write(tmp_path, "video_id:FILE,title\n../a,x\nb.mp4\n/c,y\n")
    with pytest.raises(DataError) as caught:
        read_annotations(raw, "pretrain", "train")
    assert [line.partition(": ")[0].rpartition(" ")[2] for line in str(caught.value).splitlines()] == ["2", "3", "4"]


@pytest.mark.parametrize(
    ("text", "encoding", "complaint"),
    [
        ("id,title\na.mp4,b\n", "utf-8", "must have the columns video_id:FILE, title; it has id, title"),
        ("", "utf-8", "it has no header"),
        ("video_id:FILE,title\n", "utf-8", "must have at least one row"),
        ("video_id:FILE,title\na.mp4,标题\n", "gb18030", "must be UTF-8, but it holds the byte .* iconv -f GB18030"),
    ],
)
def test_an_invalid_file_is_a_one_line_error(tmp_path: Path, text: str, encoding: str, complaint: str) -> None:
    raw = write(tmp_path, text, encoding=encoding)
    with pytest.raises(DataError, match=complaint) as caught:
        read_annotations(raw, "pretrain", "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cell", ["plain", "[]", "[1]", "__import__('os')"])
def test_references_are_never_executed(tmp_path: Path, cell: str) -> None:
    raw = write(tmp_path, f'video_id:FILE,golden_caption\na.mp4,"{cell}"\n', dataset="captioning", split="test")
    with pytest.raises(DataError, match="golden_caption must be a list literal of strings"):
        read_annotations(raw, "captioning", "test")
