"""The `mplug data` commands in the order of the README."""

import subprocess
from pathlib import Path

from tests.helpers.paths import MPLUG


def mplug(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MPLUG, *arguments], capture_output=True, text=True, timeout=200)


def succeed(*arguments: str | Path) -> str:
    ended = mplug(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_download_status_verify_and_repair(corpus: Path, tmp_path: Path) -> None:
    selected = (corpus, tmp_path, "--only", "videos/retrieval_*")
    raw = succeed("data", "download", *selected)
    videos = sorted((Path(raw) / "videos").iterdir())
    assert succeed("data", "status", raw).endswith("0 failed")
    assert succeed("data", "verify", raw) == f"{len(videos)} intact"
    videos[0].write_bytes(videos[0].read_bytes()[:-1] + b"x")
    ended = mplug("data", "verify", raw)
    assert (ended.returncode, videos[0].name in ended.stderr, "Traceback" in ended.stderr) == (3, True, False)
    assert "1 failed" in succeed("data", "status", raw)
    succeed("data", "download", *selected)
    assert succeed("data", "verify", raw) == f"{len(videos)} intact"


def test_shards_are_built_in_partitions_and_verified(corpus: Path, tmp_path: Path) -> None:
    options = ("--dataset", "captioning", "--short-side", "72", "--num-frames", "8")
    for partition in ("1/2", "2/2"):
        assert succeed("data", "shard", corpus, tmp_path, *options, "--partition", partition) == ""
    shards = succeed("data", "shard", corpus, tmp_path, *options)
    intact = succeed("data", "verify", shards)
    halves = [succeed("data", "verify", shards, "--partition", partition) for partition in ("1/2", "2/2")]
    assert int(intact.split()[0]) == sum(int(half.split()[0]) for half in halves) > 0


def test_a_file_is_copied_to_object_storage_and_back(s3: str, tmp_path: Path) -> None:
    (tmp_path / "a.dump").write_bytes(b"dump")
    assert succeed("data", "copy", tmp_path / "a.dump", f"{s3}/copies/a.dump") == f"{s3}/copies/a.dump"
    succeed("data", "copy", f"{s3}/copies/a.dump", tmp_path / "b.dump")
    assert (tmp_path / "b.dump").read_bytes() == b"dump"
    ended = mplug("data", "copy", tmp_path / "a.dump", tmp_path / "c.dump")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: one of the two must be an s3:// URI and the other a file")
