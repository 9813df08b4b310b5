"""A dataset of ModelScope: `mplug data download modelscope://modelscope/Youku-AliceMind ROOT`.

Annotation files are in the dataset's repository, videos in its object storage (Alibaba OSS). Listing ten million videos
times out, so their names are read from the annotation files. Their URLs are signed with the short-lived key that
ModelScope hands out to anyone (private datasets need MODELSCOPE_API_TOKEN).
"""

import base64
import hashlib
import hmac
import json
import os
import tempfile
import threading
import time
import urllib.parse
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.data.annotations import MAX_PROBLEMS, duplicates, hashed, read_csv, validate_path
from model.data.download import http
from model.data.download.http import Body, FetchError
from model.data.download.sources import Remote
from model.errors import DataError

SCHEME = "modelscope://"
OSS_HOST = "https://{bucket}.{region}.aliyuncs.com"
PAGE = 200
KEY_S = 900.0
"""Seconds after which the storage key is renewed, before it expires."""
STORED = "oss:"
"""Prefix of the location of a file in object storage."""


class ModelScopeSource:
    """All files of a dataset's repository, and all videos named in its annotation files."""

    def __init__(self, name: str, revision: str = "master") -> None:
        if name.count("/") != 1:
            raise DataError(f"a ModelScope dataset is {SCHEME}owner/name, got {SCHEME}{name}.")
        endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")
        self.name, self.revision = name, revision
        self.base = f"{endpoint}/api/v1/datasets"
        token = os.environ.get("MODELSCOPE_API_TOKEN", "")
        self.headers = {"Cookie": f"m_session_id={token}"} if token else {}
        self.lock = threading.Lock()
        self.key: dict[str, str] = {}
        self.key_since = 0.0

    def files(self) -> Iterator[Remote]:
        repository = list(self._repository())
        yield from repository
        known = {remote.path for remote in repository}
        with tempfile.TemporaryDirectory() as folder:
            tables = []
            for number, remote in enumerate(remote for remote in repository if remote.path.endswith(".csv")):
                tables.append((remote.path, Path(folder) / f"{number}.csv"))
                http.save(remote.location, tables[-1][1], self.headers)
            repeated = duplicates(array("Q", (hashed(path) for path in _named(tables))))
            for row, path in enumerate(_named(tables)):
                if row not in repeated and path not in known:
                    yield Remote(path=path, location=STORED + path)

    def open(self, remote: Remote, start: int, validator: str) -> Body:
        if not remote.location.startswith(STORED):
            return http.get(remote.location, start=start, validator=validator, headers=self.headers)
        try:
            key = self._storage_key()
        except DataError as error:
            raise FetchError("modelscope", str(error), transient=True) from error
        try:
            return http.get(signed_url(key, key["Dir"], remote.path), start=start, validator=validator)
        except FetchError as error:
            if error.reason == "http_403":
                self.key_since = 0.0  # expired: the next attempt requests a new one
                raise FetchError(error.reason, "the storage key was refused", transient=True) from error
            if error.reason != "http_404" or not key.get("BackupDir"):
                raise
        return http.get(signed_url(key, key["BackupDir"], remote.path), start=start, validator=validator)

    def _repository(self) -> Iterator[Remote]:
        number = self._call(self.name)["Id"]
        for page in range(1, 10_000):
            query = {"Revision": self.revision, "Root": "/", "Recursive": "True", "PageNumber": page, "PageSize": PAGE}
            files = self._call(f"{number}/repo/tree?{urllib.parse.urlencode(query)}")["Files"] or []
            for item in files:
                if item["Type"] != "tree":
                    validate_path(item["Path"])
                    yield Remote(
                        path=item["Path"],
                        location=self._address(item["Path"]),
                        size=item["Size"] or None,
                        sha256=item.get("Sha256") or "",
                    )
            if len(files) < PAGE:
                return

    def _address(self, path: str) -> str:
        query = {"Source": "SDK", "Revision": self.revision, "FilePath": path}
        return f"{self.base}/{self.name}/repo?{urllib.parse.urlencode(query)}"

    def _storage_key(self) -> dict[str, str]:
        with self.lock:
            if time.monotonic() - self.key_since > KEY_S or not self.key:
                self.key = self._call(f"{self.name}/ststoken?Revision={self.revision}")
                self.key_since = time.monotonic()
            return self.key

    def _call(self, path: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            http.save(f"{self.base}/{path}", Path(folder) / "answer", self.headers)
            try:
                answer = json.loads((Path(folder) / "answer").read_bytes())
            except ValueError as error:
                raise DataError(f"ModelScope's response for {self.name} is not JSON: {error}.") from error
        if answer.get("Code") != 200 or answer.get("Data") is None:
            hint = "" if self.headers else " Private datasets need MODELSCOPE_API_TOKEN."
            raise DataError(f"ModelScope refused {self.name}: {answer.get('Message', 'no data')}.{hint}")
        return answer["Data"]


def _named(tables: list[tuple[str, Path]]) -> Iterator[str]:
    """The paths in the annotation columns whose names end in :FILE."""
    problems: list[str] = []
    for name, local in tables:
        with read_csv(str(local), name) as reader:
            columns = [column for column in reader.fieldnames or [] if column.endswith(":FILE")]
            for row in reader:
                for path in (row[column] or "" for column in columns):
                    try:
                        validate_path(path)
                        yield path
                    except DataError as error:
                        problems.append(f"{name} line {reader.line_num}: {error}")
                if len(problems) >= MAX_PROBLEMS:
                    break
    if problems:
        raise DataError("\n".join(problems))


def signed_url(key: dict[str, str], folder: str, path: str, now: float | None = None) -> str:
    """A URL of an object that is valid for an hour (OSS signature version 1 in the query)."""
    name = f"{folder.strip('/')}/{path}"
    expires = int(now or time.time()) + 3600
    resource = f"/{key['Bucket']}/{name}?security-token={key['SecurityToken']}"
    digest = hmac.new(key["AccessSecret"].encode(), f"GET\n\n\n{expires}\n{resource}".encode(), hashlib.sha1).digest()
    query = {
        "OSSAccessKeyId": key["AccessId"],
        "Expires": expires,
        "Signature": base64.b64encode(digest).decode(),
        "security-token": key["SecurityToken"],
    }
    host = OSS_HOST.format(bucket=key["Bucket"], region=key["Region"])
    return f"{host}/{urllib.parse.quote(name)}?{urllib.parse.urlencode(query)}"
