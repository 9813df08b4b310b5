"""Publishes folders atomically: files first, manifest.json last. A folder without a manifest does not exist.

Models and tokenizers are published this way. The manifest holds the size and sha256 of every file and facts about the
folder. `fetch_folder` verifies all files.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from model import storage
from model.errors import NotFoundError, StorageError

FILE, LATEST = "manifest.json", "latest"


def publish_folder(folder: Path, base: str, **facts: Any) -> str:
    """Uploads `folder` to <base>/<version>, manifest last, and returns that URI.

    The version is the start of the manifest's sha256, so a published folder never changes.
    """
    manifest = describe_folder(folder, **facts)
    version = hashlib.sha256(manifest).hexdigest()[:12]
    uri = storage.join(base, version)
    upload_folder(folder, uri, manifest)
    storage.write(storage.join(base, LATEST), version.encode())
    return uri


def describe_folder(folder: Path, **facts: Any) -> bytes:
    """The manifest of a local folder, encoded."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE
    }
    return _encoded(files, facts)


def file_entry(data: bytes | memoryview) -> dict[str, Any]:
    """The entry of a manifest for a file with this content."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit_folder(uri: str, files: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Writes the manifest for files that were already uploaded to `uri`."""
    storage.write(storage.join(uri, FILE), _encoded(files, facts))


def _encoded(files: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> bytes:
    return json.dumps({**facts, "files": files}, ensure_ascii=False, indent=1, sort_keys=True).encode()


def upload_folder(folder: Path, uri: str, manifest: bytes) -> None:
    """Uploads the files that `manifest` lists to `uri`, then the manifest."""
    for name in json.loads(manifest)["files"]:
        storage.upload_file(folder / name, storage.join(uri, name))
    storage.write(storage.join(uri, FILE), manifest)


def latest_version(base: str) -> str:
    """URI of the most recently published version below `base`."""
    return storage.join(base, storage.read(storage.join(base, LATEST)).decode())


def version_of(uri: str) -> str:
    """The version of a published folder, the last part of its URI; of any other folder its name."""
    return uri.rstrip("/").rpartition("/")[2]


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a published folder."""
    where = storage.join(uri, FILE)
    if not storage.exists(where):
        raise NotFoundError(f"{uri} holds no {FILE}: it was never published, or its upload did not finish.")
    return json.loads(storage.read(where))


def manifest_sha256(uri: str) -> str:
    """The hash of the manifest, which covers every file it lists."""
    return hashlib.sha256(storage.read(storage.join(uri, FILE))).hexdigest()


def fetch_folder(uri: str) -> Path:
    """A local folder with the verified files of `uri`: `uri` itself if it is local, else a copy in the cache."""
    manifest = read_manifest(uri)
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StorageError(f"{uri}: file name {name!r} in {FILE} leaves the folder.")
    if not storage.is_s3(uri):
        _verify(Path(uri), manifest)
        return Path(uri)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    target = cache_folder() / "models" / digest[:24]
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        for name in manifest["files"]:
            storage.download_file(storage.join(uri, name), partial / name)
        (partial / FILE).write_text(json.dumps(manifest), encoding="utf-8")
        _verify(partial, manifest)
        with suppress(OSError):  # another process was faster; its copy was verified as well
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def fetch_model(uri: str) -> Path:
    """As `fetch_folder`; a local folder without a manifest, as others publish models, is used as it is."""
    is_foreign = not storage.is_s3(uri) and not (Path(uri) / FILE).exists() and (Path(uri) / "config.json").exists()
    return Path(uri) if is_foreign else fetch_folder(uri)


def cache_folder() -> Path:
    """Folder for copies of immutable objects: $MPLUG_CACHE, by default ~/.cache/mplug."""
    return Path(os.environ.get("MPLUG_CACHE", Path.home() / ".cache" / "mplug"))


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        found = file_sha256(folder / name) if (folder / name).is_file() else "no file"
        if found != expected["sha256"]:
            raise StorageError(f"{folder / name} must have sha256 {expected['sha256']}, got {found}. Publish it again.")
