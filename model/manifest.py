"""A folder in storage that is whole or absent: its files first, manifest.json last.

Models and tokenizers are published so. The manifest holds every file's size and sha256 and what the publisher wants to
say about the folder; `fetch` verifies all of it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from model import storage
from model.errors import NotFoundError, StorageError

FILE, LATEST = "manifest.json", "latest"


def publish_folder(folder: Path, base: str, **facts: Any) -> str:
    """Uploads `folder` to <base>/<version>, manifest last, and returns that URI.

    The version is the beginning of the manifest's sha256: it names the content, so nothing published ever changes.
    """
    manifest = describe_folder(folder, **facts)
    version = hashlib.sha256(manifest).hexdigest()[:12]
    uri = storage.join(base, version)
    upload_folder(folder, uri, manifest)
    storage.write(storage.join(base, LATEST), version.encode())
    return uri


def describe_folder(folder: Path, **facts: Any) -> bytes:
    """The manifest of a local folder."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE
    }
    return _encoded(files, facts)


def file_entry(data: bytes | memoryview) -> dict[str, Any]:
    """What a manifest says about a file with these bytes."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit_folder(uri: str, files: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Makes a whole of files that are at `uri` already."""
    storage.write(storage.join(uri, FILE), _encoded(files, facts))


def _encoded(files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> bytes:
    return json.dumps({**facts, "files": files}, ensure_ascii=False, indent=1, sort_keys=True).encode()


def upload_folder(folder: Path, uri: str, manifest: bytes) -> None:
    """Uploads what `manifest` lists to `uri`, and the manifest last."""
    for name in json.loads(manifest)["files"]:
        storage.upload(folder / name, storage.join(uri, name))
    storage.write(storage.join(uri, FILE), manifest)


def latest_version(base: str) -> str:
    """URI of the version that was published last below `base`."""
    return storage.join(base, storage.read(storage.join(base, LATEST)).decode())


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a published folder."""
    where = storage.join(uri, FILE)
    if not storage.exists(where):
        raise NotFoundError(f"{uri} holds no {FILE}: it was never published, or its upload did not finish.")
    manifest: dict[str, Any] = json.loads(storage.read(where))
    return manifest


def manifest_sha256(uri: str) -> str:
    """The hash of the manifest, and so of everything it lists."""
    return hashlib.sha256(storage.read(storage.join(uri, FILE))).hexdigest()


def fetch_folder(uri: str) -> Path:
    """A local folder with the verified files of `uri`: the folder itself, or a copy in the cache."""
    manifest = read_manifest(uri)
    if not storage.is_s3(uri):
        _verify(Path(uri), manifest)
        return Path(uri)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    target = cache_folder() / "models" / digest[:24]
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for name in manifest["files"]:
            if not (partial / name).resolve().is_relative_to(partial.resolve()):
                raise StorageError(f"{uri}: file name {name!r} in {FILE} leaves the folder.")
            storage.download(storage.join(uri, name), partial / name)
        (partial / FILE).write_text(json.dumps(manifest), encoding="utf-8")
        _verify(partial, manifest)
        with suppress(OSError):  # another process was first; its copy was verified too
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where copies of immutable objects are kept: $MPLUG_CACHE, by default ~/.cache/mplug."""
    return Path(os.environ.get("MPLUG_CACHE", Path.home() / ".cache" / "mplug"))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        found = file_sha256(folder / name) if (folder / name).is_file() else "no file"
        if found != expected["sha256"]:
            raise StorageError(f"{folder / name} must have sha256 {expected['sha256']}, got {found}. Publish it again.")
