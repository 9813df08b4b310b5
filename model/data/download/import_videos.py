"""Imports a folder of videos and a table as a dataset in the published layout: `mplug data import`.

The table is a CSV with a column of paths, a column of texts, and optionally `label` and `split`. For the instruction
dataset it is a JSONL file of conversations (model/data/conversations.py), each optionally with `split`.
"""

import csv
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model import storage
from model.data.annotations import (
    COLUMNS,
    DATASETS,
    INSTRUCTION,
    MAX_PROBLEMS,
    SPLITS,
    annotation_path,
    conversation_annotation,
    read_csv,
    read_lines,
    validate_path,
)
from model.data.conversations import media_of
from model.data.download.http import Body
from model.data.download.sources import Remote, open_stored
from model.errors import DataError

VIDEO = ("video", "path", "file", "filename", "video_id", "video_id:FILE", "clip_name:FILE")
TEXT = ("text", "title", "caption", "golden_caption")
TEST_SHARE, VAL_SHARE = 0.1, 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    text: str
    """Text of a clip, or the JSON of a conversation."""
    media: tuple[str, ...]
    """Paths of the clip, or of the videos and images of the conversation."""
    label: str
    split: str

    @property
    def video(self) -> str:
        """Path of the clip, or of the first medium."""
        return self.media[0] if self.media else ""


class ImportedVideos:
    """Videos of a folder or bucket, with annotation files generated from the user's table."""

    def __init__(self, videos: str, rows: list[Row], dataset: str, generated: Path) -> None:
        """`generated` is an empty local folder for the generated annotation files."""
        self.videos, self.rows, self.generated = videos, rows, generated
        self._annotate(dataset)

    def validate_same(self, raw: str) -> None:
        """Raises DataError if `raw` holds other annotations: the rows of two datasets would be mixed."""
        for dataset, split in itertools.product(DATASETS, SPLITS):
            name = annotation_path(dataset, split)
            theirs, ours = storage.join(raw, name), self.generated / name
            if storage.exists(theirs) and (not ours.exists() or ours.read_bytes() != storage.read(theirs)):
                raise DataError(f"{raw} holds another dataset: {name} differs. Choose another --name.")

    def files(self) -> Iterator[Remote]:
        for path in sorted(self.generated.rglob("*.*")):
            yield self._remote(path.relative_to(self.generated).as_posix(), str(path))
        for video in sorted({path for row in self.rows for path in row.media}):
            yield self._remote(video, storage.join(self.videos, video))

    def open(self, remote: Remote, start: int, validator: str) -> Body:
        return open_stored(remote, start, validator)

    def _remote(self, path: str, location: str) -> Remote:
        entry = storage.head(location)
        if entry is None:
            raise DataError(f"{location} was removed during the import.")
        return Remote(path=path, location=location, size=entry.size, version=entry.version)

    def _annotate(self, dataset: str) -> None:
        by_split: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_split[row.split].append(row)
        for split, rows in by_split.items():
            path = self.generated / annotation_path(dataset, split)
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                if dataset == INSTRUCTION:
                    file.writelines(row.text + "\n" for row in rows)
                    continue
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS[dataset])
                writer.writerows(_published(dataset, split, rows))
        if dataset == "classification":
            names = sorted({row.label for row in self.rows})
            numbers = json.dumps({name: number for number, name in enumerate(names)}, ensure_ascii=False)
            (self.generated / "classname.json").write_text(numbers + "\n", encoding="utf-8")


def read_rows(table: str, videos: str, dataset: str) -> list[Row]:
    """Reads the user's table. Raises DataError with one line per unusable row."""
    if dataset not in DATASETS:
        raise DataError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset}.")
    problems: list[str] = []
    rows: list[Row] = []
    seen: dict[tuple[str, str], int] = {}
    with read_lines(table) if dataset == INSTRUCTION else _table_rows(table, dataset) as items:
        for number, item in items:
            try:
                row = _conversation(item) if isinstance(item, str) else item
                _validate(row, videos, dataset)
                if earlier := seen.get((row.video, row.text)):
                    raise DataError(f"line {earlier} has the same video and text.")
                seen[row.video, row.text] = number
                rows.append(row)
            except DataError as error:
                problems.append(f"{table} line {number}: {error}")
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"{len(problems) - MAX_PROBLEMS} more rows of {table} cannot be used."]
    if problems:
        raise DataError("\n".join(problems))
    if not rows:
        raise DataError(
            f"{table} must have at least one row{'' if dataset == INSTRUCTION else ' below its header'}; it has none."
        )
    return rows


@contextmanager
def _table_rows(table: str, dataset: str) -> Iterator[Iterator[tuple[int, Row]]]:
    """The numbered rows of a CSV."""
    with read_csv(table) as reader:
        names = list(reader.fieldnames or ())
        video, text = (next((name for name in known if name in names), "") for known in (VIDEO, TEXT))
        if not video or not text or (dataset == "classification" and "label" not in names):
            needed = "label and " if dataset == "classification" else ""
            raise DataError(
                f"{table} must have {needed}one column of {', '.join(VIDEO)} and one of {', '.join(TEXT)}; it has "
                f"{', '.join(names) or 'no header'}."
            )
        yield (
            (
                reader.line_num,
                Row(
                    text=item[text] or "",
                    media=(item[video] or "",),
                    label=item.get("label") or "",
                    split=item.get("split") or _drawn(item[video] or "", dataset),
                ),
            )
            for item in reader
        )


def _conversation(line: str) -> Row:
    annotation = conversation_annotation(line)
    media = tuple(path for _, path in media_of(annotation.conversation))
    split = json.loads(line).get("split") or _drawn(annotation.video or line, INSTRUCTION)
    return Row(text=line.strip(), media=media, label=annotation.label, split=str(split))


def _validate(row: Row, videos: str, dataset: str) -> None:
    """Raises DataError for an unusable row."""
    for path in row.media:
        validate_path(path)
    if row.split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {row.split!r}.")
    if dataset == "classification" and not row.label:
        raise DataError("label must not be empty.")
    if not row.text.strip():
        raise DataError("the text must not be empty.")
    for path in row.media:
        if storage.head(storage.join(videos, path)) is None:
            raise DataError(f"{storage.join(videos, path)} does not exist.")


def _drawn(video: str, dataset: str) -> str:
    """The split of a video if the table has none: deterministic, 10 % each for validation and test."""
    if dataset == "pretrain":
        return "train"
    share = int.from_bytes(hashlib.sha256(video.encode()).digest()[:4]) / 2**32
    return "test" if share < TEST_SHARE else "val" if share < TEST_SHARE + VAL_SHARE else "train"


def _published(dataset: str, split: str, rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Rows of an annotation file. For evaluation, all captions of a video are in one row."""
    if dataset != "captioning" or split == "train":
        for row in rows:
            yield (row.video, row.text, row.label) if dataset == "classification" else (row.video, row.text)
        return
    captions: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        captions[row.video].append(row.text)
    for video, texts in captions.items():
        yield video, repr(texts)
