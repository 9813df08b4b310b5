import ast
import csv
import json
import subprocess
from pathlib import Path

import pytest

from model.data.annotations import read_annotations
from model.data.download.import_videos import read_rows
from model.data.shards.reader import ShardReader, read_dataset_info
from model.errors import DataError
from tests.helpers.paths import MPLUG


@pytest.fixture
def videos(corpus: Path) -> Path:
    return corpus / "videos"


def names(videos: Path, count: int) -> list[str]:
    return sorted(path.name for path in videos.iterdir())[:count]


def write(path: Path, rows: list[list[str]], encoding: str = "utf-8") -> str:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MPLUG, "data", "import", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_one_command_imports_a_dataset(videos: Path, tmp_path: Path, encoding: str) -> None:
    rows = [[name, f"标题 {number}"] for number, name in enumerate(names(videos, 5))]
    table = write(tmp_path / "own.csv", [["video", "title"], *rows], encoding)
    done = run(str(videos), table, str(tmp_path / "work"), "--short-side", "32")
    assert done.returncode == 0, done.stderr
    shards = done.stdout.strip()
    found = {row.video: row.text for row in ShardReader(f"{shards}/train").annotations()}
    assert found == dict(rows)
    assert (tmp_path / "work/raw/own" / rows[0][0]).read_bytes() == (videos / rows[0][0]).read_bytes()


def test_splits_are_by_video_and_references_are_grouped(videos: Path, tmp_path: Path) -> None:
    used = names(videos, 60)
    rows = [[name, f"第{n}句 {name}"] for name in used for n in (1, 2)]
    table = write(tmp_path / "own.csv", [["path", "caption"], *rows])
    done = run(str(videos), table, str(tmp_path), "--dataset", "captioning", "--form", "original")
    assert done.returncode == 0, done.stderr
    raw = str(tmp_path / "raw" / "own")
    splits = {split: read_annotations(raw, "captioning", split) for split in ("train", "val", "test")}
    drawn = [{row.video for row in rows} for rows in splits.values()]
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 60
    assert all(len(videos) >= 2 for videos in drawn)
    assert len(splits["train"]) == 2 * len(drawn[0])
    with (tmp_path / "raw/own/captioning/test.csv").open(encoding="utf-8", newline="") as file:
        first = next(iter(csv.DictReader(file)))
    assert len(ast.literal_eval(first["golden_caption"])) == 2


def test_labels_become_numbered_categories(videos: Path, tmp_path: Path) -> None:
    rows = [[name, "题", "乙甲"[n % 2], ["train", "test"][n % 2]] for n, name in enumerate(names(videos, 6))]
    table = write(tmp_path / "own.csv", [["file", "text", "label", "split"], *rows])
    done = run(str(videos), table, str(tmp_path), "--dataset", "classification", "--num-frames", "2")
    assert done.returncode == 0, done.stderr
    facts = read_dataset_info(done.stdout.strip())
    assert facts["class_names"] == ["乙", "甲"]
    assert facts["clips"] == {"train": 3, "test": 3}


def test_two_datasets_cannot_share_a_name(videos: Path, tmp_path: Path) -> None:
    first, second = (
        write(tmp_path / f"{n}.csv", [["video", "title"], [name, "题"]]) for n, name in enumerate(names(videos, 2))
    )
    assert run(str(videos), first, str(tmp_path), "--short-side", "32").returncode == 0
    assert run(str(videos), first, str(tmp_path), "--short-side", "32").returncode == 0
    refused = run(str(videos), second, str(tmp_path), "--short-side", "32")
    assert refused.returncode == 3
    assert "holds another dataset" in refused.stderr
    assert run(str(videos), second, str(tmp_path), "--short-side", "32", "--name", "other").returncode == 0


@pytest.mark.parametrize(
    ("header", "row", "complaint"),
    [
        (["name", "title"], ["a.mp4", "x"], "must have one column of video, path"),
        (["video", "note"], ["a.mp4", "x"], "and one of text, title"),
        (["video", "title"], ["nowhere.mp4", "x"], r"line 3: .*nowhere\.mp4 does not exist"),
        (["video", "title"], ["../secret.mp4", "x"], "line 3: the path of a video must stay below"),
        (["video", "title"], ["{0}", "好"], "line 3: line 2 has the same video and text"),
        (["video", "title"], ["{1}", " "], "line 3: the text must not be empty"),
        (["video", "title", "split"], ["{1}", "x", "dev"], "line 3: split must be one of train, val, test, got 'dev'"),
    ],
)
def test_an_invalid_table_is_rejected_with_line_numbers(
    videos: Path, tmp_path: Path, header: list[str], row: list[str], complaint: str
) -> None:
    known = names(videos, 2)
    good = [known[0], "好", "train"][: len(header)]
    table = write(tmp_path / "own.csv", [header, good, [cell.format(*known) for cell in row]])
    with pytest.raises(DataError, match=complaint):
        read_rows(table, str(videos), "pretrain")


def test_another_encoding_is_a_one_line_error(videos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "own.csv", [["video", "title"], [names(videos, 1)[0], "标题"]], "gb18030")
    done = run(str(videos), table, str(tmp_path / "work"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "must be UTF-8" in done.stderr
    assert not (tmp_path / "work").exists()


def test_conversations_are_imported_with_their_media(videos: Path, tmp_path: Path) -> None:
    used = names(videos, 2)
    rows = [
        {"text": "Human: <|video|>\nHuman: 什么？\nAI: 好", "video": used[:1], "split": "train"},
        {"text": "Human: <|video|>\nHuman: <|video|>\nAI: 好", "video": used, "split": "train"},
    ]
    table = tmp_path / "chats.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run(str(videos), str(table), str(tmp_path / "work"), "--dataset", "instruction", "--short-side", "32")
    assert done.returncode == 0, done.stderr
    assert [len(ShardReader(f"{done.stdout.strip()}/train").record(row).media) for row in (0, 1)] == [1, 2]
    table.write_text(json.dumps({**rows[0], "video": ["nothing.mp4"]}) + "\n{}\n", encoding="utf-8")
    failed = run(str(videos), str(table), str(tmp_path / "other"), "--dataset", "instruction")
    assert failed.returncode == 3
    assert "line 1: " in failed.stderr
    assert "nothing.mp4 does not exist." in failed.stderr
    assert "line 2: must have one of the keys messages, conversations, text" in failed.stderr
