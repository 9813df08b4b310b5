"""Reads annotation files, one per dataset and split: those of Youku-mPLUG, and conversations.

<raw>/pretrain/train.csv          video_id:FILE, title
<raw>/classification/<split>.csv  video_id:FILE, title, label
<raw>/retrieval/<split>.csv       clip_name:FILE, caption
<raw>/captioning/<split>.csv      video_id:FILE, golden_caption   (a list literal of references in val and test)
<raw>/instruction/<split>.jsonl   a conversation per line, see model/data/conversations.py
"""

import ast
import csv
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model import storage
from model.data.conversations import Conversation, media_of, parse_conversation
from model.errors import DataError

COLUMNS: dict[str, tuple[str, ...]] = {
    "pretrain": ("video_id:FILE", "title"),
    "classification": ("video_id:FILE", "title", "label"),
    "retrieval": ("clip_name:FILE", "caption"),
    "captioning": ("video_id:FILE", "golden_caption"),
}
"""Columns of the CSV datasets."""
INSTRUCTION = "instruction"
"""The dataset of conversations."""
DATASETS = (*COLUMNS, INSTRUCTION)
SPLITS = ("train", "val", "test")
LEDGER = ".ledger"
"""Folder of a raw dataset that holds the download ledger."""
MAX_PROBLEMS = 20
"""Number of bad rows of a file after which reading stops."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One row: a clip and its text, or a conversation."""

    video: str
    """Path of the clip relative to the dataset's root; of a conversation its first medium, or nothing."""
    text: str
    """Title, caption, or the messages of a conversation in JSON."""
    label: str = ""
    """Category, in the classification dataset; question type, in the instruction dataset."""
    references: tuple[str, ...] = ()
    """Captions that an evaluation accepts, in lower case as in the original code."""

    @property
    def conversation(self) -> Conversation:
        """The messages of a row of the instruction dataset."""
        messages: Conversation = json.loads(self.text)
        return messages


def annotation_path(dataset: str, split: str) -> str:
    """Path of an annotation file below the root of the raw dataset."""
    return f"{dataset}/{split}.{'jsonl' if dataset == INSTRUCTION else 'csv'}"


def annotation_file(raw: str, dataset: str, split: str) -> str | None:
    """URI of the annotation file of a split; None if it does not exist."""
    if dataset not in DATASETS:
        raise DataError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset}.")
    uri = storage.join(raw, annotation_path(dataset, split))
    return uri if storage.exists(uri) else None


def read_annotations(raw: str, dataset: str, split: str) -> list[Annotation]:
    """All rows of one split; see `iter_annotations`."""
    return list(iter_annotations(raw, dataset, split))


def iter_annotations(raw: str, dataset: str, split: str) -> Iterator[Annotation]:
    """Streams the rows of one split. Raises DataError: immediately for an unusable file, at the end for bad rows, with
    one line per row."""
    uri = annotation_file(raw, dataset, split)
    if uri is None:
        raise DataError(f"{storage.join(raw, annotation_path(dataset, split))} does not exist.")
    if dataset == INSTRUCTION:
        with read_lines(uri) as lines:
            yield from _parsed(uri, lines, conversation_annotation)
        return
    with read_csv(uri) as reader:
        missing = set(COLUMNS[dataset]) - set(reader.fieldnames or ())
        if missing:
            wanted, found = ", ".join(COLUMNS[dataset]), ", ".join(reader.fieldnames or ["no header"])
            raise DataError(f"{uri} must have the columns {wanted}; it has {found}.")
        rows = ((reader.line_num, row) for row in reader)
        yield from _parsed(uri, rows, lambda row: _annotation(row, dataset, split), " below its header")


@contextmanager
def read_csv(uri: str, name: str = "") -> "Iterator[csv.DictReader[str]]":
    """A CSV file as a stream of rows. Raises DataError if it is not CSV or not UTF-8."""
    with _utf8(uri, name or uri) as file:
        try:
            yield csv.DictReader(file)
        except csv.Error as error:
            raise DataError(f"{name or uri} must be CSV: {error}.") from error


@contextmanager
def read_lines(uri: str) -> Iterator[Iterator[tuple[int, str]]]:
    """The lines of a file that are not empty, with their numbers. Raises DataError if it is not UTF-8."""
    with _utf8(uri, uri) as file:
        yield ((number, line) for number, line in enumerate(file, start=1) if line.strip())


@contextmanager
def _utf8(uri: str, name: str) -> Iterator[Iterable[str]]:
    with storage.open_text(uri, "utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} must be UTF-8, but it holds the byte 0x{error.object[error.start]:02x}. "
                f"Convert it, from GB18030 for instance: iconv -f GB18030 -t UTF-8."
            ) from error


def _parsed(
    uri: str, rows: Iterable[tuple[int, T]], parse: Callable[[T], Annotation], where: str = ""
) -> Iterator[Annotation]:
    """Parses numbered rows; raises DataError for the bad ones at the end."""
    problems: list[str] = []
    is_empty = True
    for number, row in rows:
        is_empty = False
        try:
            yield parse(row)
        except DataError as error:
            problems.append(f"{uri} line {number}: {error}")
            if len(problems) == MAX_PROBLEMS:
                raise DataError("\n".join([*problems, f"{uri}: no more rows were read."])) from error
    if problems:
        raise DataError("\n".join(problems))
    if is_empty:
        raise DataError(f"{uri} must have at least one row{where}; it has none.")


def conversation_annotation(line: str) -> Annotation:
    """The annotation of a line of the instruction dataset. Raises DataError."""
    conversation, question_type = parse_conversation(line)
    media = media_of(conversation)
    for _, path in media:
        validate_path(path)
    text = json.dumps(conversation, ensure_ascii=False, separators=(",", ":"))
    return Annotation(video=media[0][1] if media else "", text=text, label=question_type)


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
