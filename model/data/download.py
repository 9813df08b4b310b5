"""Copies a dataset as published into object storage: `mplug data download SOURCE ROOT`."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from model import storage
from model.data.annotations import COLUMNS, DataError
from model.progress import progress
from model.storage import Entry

THREADS = 8


def download(source: str, root: str, dataset: str = "youku-mplug") -> tuple[str, dict[str, float]]:
    """Copies every object below `source` to <root>/raw/<dataset>; returns that URI and what was done.

    Objects that are there with the same size are not copied again, so an interrupted download goes on.
    """
    files = list(storage.walk(source))
    if not any(entry.path.endswith(".csv") for entry in files):
        known = ", ".join(f"{name}/<split>.csv" for name in COLUMNS)
        raise DataError(f"{source} must hold annotation files ({known}); no .csv found.")
    uri = storage.join(root, "raw", dataset)
    present = {entry.path: entry.size for entry in storage.walk(uri)}
    wanted = [entry for entry in files if present.get(entry.path) != entry.size]
    copied = 0
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = pool.map(partial(_copy, source, uri), wanted)
        for size in progress(sizes, total=len(wanted), desc=f"copying to {uri}", unit="file"):
            copied += size
    return uri, {"files": len(files), "files_copied": len(wanted), "bytes_copied": copied}


def _copy(source: str, uri: str, entry: Entry) -> int:
    data = storage.read(storage.join(source, entry.path))
    if len(data) != entry.size:
        raise DataError(f"{entry.path} changed while it was read: {entry.size} bytes were listed, {len(data)} came.")
    storage.write(storage.join(uri, entry.path), data)
    return len(data)
