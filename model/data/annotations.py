"""Reads Youku-mPLUG's annotation files: one CSV per dataset and split, videos beside it.

<raw>/pretrain/train.csv          video_id:FILE, title
<raw>/classification/<split>.csv  video_id:FILE, title, label
<raw>/retrieval/<split>.csv       clip_name:FILE, caption
<raw>/captioning/<split>.csv      video_id:FILE, golden_caption   (a list literal of references in val and test)
"""

import ast
import csv
import io
import json
from dataclasses import dataclass
from pathlib import PurePosixPath

from model import storage

COLUMNS: dict[str, tuple[str, ...]] = {
    "pretrain": ("video_id:FILE", "title"),
    "classification": ("video_id:FILE", "title", "label"),
    "retrieval": ("clip_name:FILE", "caption"),
    "captioning": ("video_id:FILE", "golden_caption"),
}
SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """The data cannot be used as they are. Ends a command with exit code 3."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One row: a clip and what is said about it."""

    video: str
    """Path of the clip relative to the dataset's root."""
    text: str
    """Title or caption."""
    label: str = ""
    """Category, in the classification dataset."""
    references: tuple[str, ...] = ()
    """All captions that an evaluation accepts, lower-cased as upstream does."""


def read_annotations(raw: str, dataset: str, split: str) -> list[Annotation]:
    """All rows of one split. Raises DataError with one line per bad row."""
    if dataset not in COLUMNS:
        raise DataError(f"dataset must be one of {', '.join(COLUMNS)}, got {dataset}.")
    uri = storage.join(raw, dataset, f"{split}.csv")
    try:
        text = storage.read(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} must be UTF-8, byte {error.start} is not. Convert it with iconv.") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = set(COLUMNS[dataset]) - set(reader.fieldnames or ())
    if missing:
        wanted, found = ", ".join(COLUMNS[dataset]), ", ".join(reader.fieldnames or ["no header"])
        raise DataError(f"{uri} must have the columns {wanted}; it has {found}.")
    annotations, problems = [], []
    for line, row in enumerate(reader, start=2):
        try:
            annotations.append(_annotation(row, dataset, split))
        except DataError as error:
            problems.append(f"{uri} line {line}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    if not annotations:
        raise DataError(f"{uri} must have at least one row below its header, it has none.")
    return annotations


def read_class_names(raw: str) -> list[str]:
    """The categories in the order of their published numbers (classname.json)."""
    numbers: dict[str, int] = json.loads(storage.read(storage.join(raw, "classname.json")))
    return sorted(numbers, key=lambda name: numbers[name])


def _annotation(row: dict[str, str | None], dataset: str, split: str) -> Annotation:
    values = [row.get(column) for column in COLUMNS[dataset]]
    if any(value is None for value in values):
        raise DataError(f"must have {len(values)} values, got {sum(value is not None for value in values)}.")
    video, text, *rest = (value or "" for value in values)
    _refuse_escape(video)
    if dataset != "captioning" or split == "train":
        return Annotation(video=video, text=text, label=rest[0] if rest else "")
    try:
        references = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise DataError(f"golden_caption must be a list literal of strings, got {text[:40]!r}.") from error
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references) or not references:
        raise DataError(f"golden_caption must be a list literal of strings, got {text[:40]!r}.")
    return Annotation(video=video, text=references[0], references=tuple(item.lower() for item in references))


def _refuse_escape(video: str) -> None:
    path = PurePosixPath(video)
    if not video or path.is_absolute() or ".." in path.parts or "\\" in video or "\0" in video:
        raise DataError(f"the video's path must stay below the dataset's root, got {video!r}.")
