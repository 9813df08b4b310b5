"""Reads the annotation files of Youku-mPLUG: one CSV per dataset and split.

<raw>/pretrain/train.csv          video_id:FILE, title
<raw>/classification/<split>.csv  video_id:FILE, title, label
<raw>/retrieval/<split>.csv       clip_name:FILE, caption
<raw>/captioning/<split>.csv      video_id:FILE, golden_caption   (a list literal of references in val and test)
"""

import ast
import csv
import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from model import storage
from model.errors import DataError

COLUMNS: dict[str, tuple[str, ...]] = {
    "pretrain": ("video_id:FILE", "title"),
    "classification": ("video_id:FILE", "title", "label"),
    "retrieval": ("clip_name:FILE", "caption"),
    "captioning": ("video_id:FILE", "golden_caption"),
}
SPLITS = ("train", "val", "test")
LEDGER = ".ledger"
"""Folder of a raw dataset that holds the download ledger."""
MAX_PROBLEMS = 20
"""Number of bad rows of a file after which reading stops."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One row: a clip and its text."""

    video: str
    """Path of the clip relative to the dataset's root."""
    text: str
    """Title or caption."""
    label: str = ""
    """Category, in the classification dataset."""
    references: tuple[str, ...] = ()
    """Captions that an evaluation accepts, in lower case as in the original code."""


def annotation_file(raw: str, dataset: str, split: str) -> str | None:
    """URI of the annotation file of a split; None if it does not exist."""
    if dataset not in COLUMNS:
        raise DataError(f"dataset must be one of {', '.join(COLUMNS)}, got {dataset}.")
    uri = storage.join(raw, dataset, f"{split}.csv")
    return uri if storage.exists(uri) else None


def read_annotations(raw: str, dataset: str, split: str) -> list[Annotation]:
    """All rows of one split; see `iter_annotations`."""
    return list(iter_annotations(raw, dataset, split))


def iter_annotations(raw: str, dataset: str, split: str) -> Iterator[Annotation]:
    """Streams the rows of one split. Raises DataError: immediately for an unusable file, at the end for bad rows, with
    one line per row."""
    uri = annotation_file(raw, dataset, split)
    if uri is None:
        raise DataError(f"{storage.join(raw, dataset, split + '.csv')} does not exist.")
    with read_csv(uri) as reader:
        yield from _rows(reader, uri, dataset, split)


@contextmanager
def read_csv(uri: str, name: str = "") -> "Iterator[csv.DictReader[str]]":
    """A CSV file as a stream of rows. Raises DataError if it is not CSV or not UTF-8."""
    with storage.open_text(uri, "utf-8-sig") as file:
        uri = name or uri
        try:
            yield csv.DictReader(file)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{uri} must be UTF-8, but it holds the byte 0x{error.object[error.start]:02x}. "
                f"Convert it, from GB18030 for instance: iconv -f GB18030 -t UTF-8."
            ) from error
        except csv.Error as error:
            raise DataError(f"{uri} must be CSV: {error}.") from error


def _rows(reader: "csv.DictReader[str]", uri: str, dataset: str, split: str) -> Iterator[Annotation]:
    missing = set(COLUMNS[dataset]) - set(reader.fieldnames or ())
    if missing:
        wanted, found = ", ".join(COLUMNS[dataset]), ", ".join(reader.fieldnames or ["no header"])
        raise DataError(f"{uri} must have the columns {wanted}; it has {found}.")
    problems: list[str] = []
    is_empty = True
    for row in reader:
        is_empty = False
        try:
            yield _annotation(row, dataset, split)
        except DataError as error:
            problems.append(f"{uri} line {reader.line_num}: {error}")
            if len(problems) == MAX_PROBLEMS:
                raise DataError("\n".join([*problems, f"{uri}: no more rows were read."])) from error
    if problems:
        raise DataError("\n".join(problems))
    if is_empty:
        raise DataError(f"{uri} must have at least one row below its header; it has none.")


def read_class_names(raw: str) -> list[str]:
    """The categories in the order of their published numbers (classname.json)."""
    numbers: dict[str, int] = json.loads(storage.read(storage.join(raw, "classname.json")))
    return sorted(numbers, key=lambda name: numbers[name])


def _annotation(row: dict[str, str | None], dataset: str, split: str) -> Annotation:
    values = [row.get(column) for column in COLUMNS[dataset]]
    if any(value is None for value in values):
        raise DataError(f"must have {len(values)} values, got {sum(value is not None for value in values)}.")
    video, text, *rest = (value or "" for value in values)
    validate_path(video)
    if dataset != "captioning" or split == "train":
        return Annotation(video=video, text=text, label=rest[0] if rest else "")
    try:
        references = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise DataError(f"golden_caption must be a list literal of strings, got {text[:40]!r}.") from error
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references) or not references:
        raise DataError(f"golden_caption must be a list literal of strings, got {text[:40]!r}.")
    return Annotation(video=video, text=references[0], references=tuple(item.lower() for item in references))


def hashed(*texts: str) -> int:
    """A 64-bit hash, which takes less memory than the text for millions of rows."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest())


def duplicates(hashes: "array[int]") -> dict[int, int]:
    """For every repeated hash: its position -> the first position with the same hash."""
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    again = np.flatnonzero(values[order][1:] == values[order][:-1]) + 1
    firsts: dict[int, int] = {}
    for place in again.tolist():
        earlier = int(order[place - 1])
        firsts[int(order[place])] = firsts.get(earlier, earlier)
    return firsts


def validate_path(path: str) -> None:
    """Raises DataError if an untrusted path would leave the root of the dataset or does not name a file."""
    parts = path.split("/")
    is_plain = all(parts) and not {".", ".."} & set(parts) and not re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", path)
    if not is_plain or parts[0] == LEDGER:
        raise DataError(f"the path of a video must stay below the root of the dataset, without '..', got {path!r}.")
