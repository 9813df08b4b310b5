"""Sources of a dataset: a folder or bucket, a list of URLs, or ModelScope (model/data/download/modelscope.py)."""

import csv
import json
import tempfile
import urllib.parse
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from model import storage
from model.data.annotations import (
    DATASETS,
    LEDGER,
    MAX_PROBLEMS,
    SPLITS,
    annotation_file,
    annotation_path,
    duplicates,
    hashed,
    validate_path,
)
from model.data.download import http
from model.data.download.http import Body, FetchError
from model.errors import DataError, NotFoundError, StorageError

CHUNK = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file of a source."""

    path: str
    """Relative to the root of the dataset, at the source and in the copy."""
    location: str
    """Location that the source opens."""
    size: int | None = None
    sha256: str = ""
    version: str = ""
    """Changes with the file, if the source provides it."""

    @property
    def identity(self) -> str:
        size = "" if self.size is None else str(self.size)
        # a signature is secret, and different every time
        return self.version or self.sha256 or size or http.redact_url(self.location)


class Source(Protocol):
    def files(self) -> Iterator[Remote]:
        """All files in a fixed order. Raises DataError for unusable names."""

    def open(self, remote: Remote, start: int, validator: str) -> Body:
        """The file from `start`, if `validator` still identifies it. Raises FetchError."""


class StorageSource:
    """A folder, or a prefix of a bucket, in the published layout."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if not any(annotation_file(uri, dataset, split) for dataset in DATASETS for split in SPLITS):
            known = ", ".join(annotation_path(name, "<split>") for name in DATASETS)
            raise DataError(f"{uri} must hold annotation files ({known}); none found.")

    def files(self) -> Iterator[Remote]:
        for entry in storage.walk(self.uri):
            if not entry.path.startswith(f"{LEDGER}/"):
                validate_path(entry.path)
                where = storage.join(self.uri, entry.path)
                yield Remote(path=entry.path, location=where, size=entry.size, version=entry.version)

    def open(self, remote: Remote, start: int, validator: str) -> Body:
        return open_stored(remote, start, validator)


def open_stored(remote: Remote, start: int, validator: str) -> Body:
    """Opens a file of a folder or a bucket."""
    size, version = remote.size or 0, remote.version
    if validator and validator != version:  # partly read, and changed since it was listed
        start = 0
    return Body(start=start, size=size, validator=version, chunks=_chunks(remote.location, start, size, version))


def _chunks(uri: str, start: int, size: int, version: str) -> Iterator[bytes]:
    try:
        if size <= CHUNK and not start:
            yield storage.read(uri)
            return
        yield from storage.read_pieces(uri, start, size - start, CHUNK)
        now = storage.head(uri)
    except StorageError as error:
        gone = isinstance(error, NotFoundError)
        raise FetchError("not_found" if gone else "storage", str(error), transient=not gone) from error
    if now is None or now.version != version:
        raise FetchError("changed", "the file changed while it was read; list the source again", transient=False)


class ManifestSource:
    """A list of URLs: CSV, TSV or JSON lines with `url` and maybe `path`, `size`, `sha256`; or one URL per line."""

    def __init__(self, location: str) -> None:
        self.location, self.name = location, http.redact_url(location)

    def files(self) -> Iterator[Remote]:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(self.location)
            if is_http(self.location):
                local = Path(folder) / "manifest"
                http.save(self.location, local)
            repeated = self._check(local)
            yield from (remote for row, remote in enumerate(self._rows(local)) if row not in repeated)

    def open(self, remote: Remote, start: int, validator: str) -> Body:
        return http.get(remote.location, start=start, validator=validator)

    def _check(self, local: Path) -> set[int]:
        """Validates the whole list before any download. Returns the rows that repeat an earlier one exactly."""
        paths, whole = array("Q"), array("Q")
        for remote in self._rows(local):
            paths.append(hashed(remote.path))
            whole.append(hashed(remote.path, remote.location, remote.identity))
        same, twice = duplicates(whole), duplicates(paths)
        clashes = [f"rows {twice[row] + 1} and {row + 1}" for row in twice if row not in same]
        if clashes:
            raise DataError(
                f"{self.name}: each path must name one file; {', '.join(clashes[:MAX_PROBLEMS])} have the same path."
            )
        return set(same)

    def _rows(self, local: Path) -> Iterator[Remote]:
        problems: list[str] = []
        number = 0
        try:
            with local.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(self._parsed(file), start=1):
                    try:
                        yield self._remote(row)
                    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
                        problems.append(f"{self.name} row {number}: {error or type(error).__name__}")
                        if len(problems) == MAX_PROBLEMS:
                            break
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} must be UTF-8, {error.reason} after row {number}.") from error
        except (csv.Error, json.JSONDecodeError) as error:
            raise DataError(f"{self.name} cannot be read after row {number}: {error}.") from error
        if problems:
            raise DataError("\n".join(problems))

    def _parsed(self, file: Any) -> Iterator[dict[str, Any]]:
        suffix = PurePosixPath(urllib.parse.urlsplit(self.location).path).suffix
        match suffix:
            case ".csv" | ".tsv":
                reader = csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t")
                if "url" not in (reader.fieldnames or []):
                    raise DataError(f"{self.name} must have a column url, it has {', '.join(reader.fieldnames or [])}.")
                yield from reader
            case ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            case _:
                yield from ({"url": line.strip()} for line in file if line.strip())

    def _remote(self, row: dict[str, Any]) -> Remote:
        base = self.location if is_http(self.location) else ""
        url = urllib.parse.urljoin(base, row["url"])
        if not is_http(url):
            raise DataError(f"url must begin with http:// or https://, got {url!r}.")
        path = row.get("path") or _relative(url, base)
        validate_path(path)
        size = row.get("size")
        return Remote(
            path=path,
            location=url,
            sha256=(row.get("sha256") or "").lower(),
            size=int(size) if size not in (None, "") else None,
        )


def _relative(url: str, base: str) -> str:
    """The path relative to the folder of the list, or else the path on its host."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    folder = urllib.parse.unquote(urllib.parse.urlsplit(base).path).rpartition("/")[0] + "/"
    return path.removeprefix(folder) if base and path.startswith(folder) else path.lstrip("/")


def is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))
