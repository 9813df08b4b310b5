import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import manifest, storage
from model.errors import StorageError
from tests.helpers.clients import fresh_clients


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "base")
    return storage.join(request.getfixturevalue("s3"), tmp_path.name)


def listed(uri: str) -> list[tuple[str, int]]:
    return [(entry.path, entry.size) for entry in storage.walk(uri)]


def test_write_read_list_and_exists(base: str) -> None:
    uri = storage.join(base, "文件夹", "a b.bin")
    assert not storage.exists(uri)
    storage.write(uri, b"data")
    assert storage.read(uri) == b"data"
    assert storage.exists(uri)
    assert listed(base) == [("文件夹/a b.bin", 4)]


def test_a_prefix_is_a_folder_name(base: str) -> None:
    storage.write(storage.join(base, "run", "x"), b"1")
    storage.write(storage.join(base, "run-2", "x"), b"22")
    assert listed(storage.join(base, "run")) == [("x", 1)]


def test_an_objects_version_changes_with_its_content(base: str) -> None:
    uri = storage.join(base, "x")
    assert storage.head(uri) is None
    storage.write(uri, b"one")
    first = storage.head(uri)
    storage.write(uri, b"two")
    second = storage.head(uri)
    assert first is not None
    assert second is not None
    assert first.size == second.size == 3
    assert first.version != second.version


def test_range_reads_match_a_local_file(base: str) -> None:
    uri, data = storage.join(base, "x"), bytes(range(256)) * 8
    storage.write(uri, data)
    assert storage.read_range(uri, 1000, 500) == data[1000:1500]
    assert storage.read_range(uri, 2000, 500) == data[2000:]
    file = storage.RandomAccess(uri)
    file.seek(-8, 2)
    assert file.read() == data[-8:]
    file.seek(10)
    assert file.read(5) == data[10:15]


def test_move_is_repeatable_and_remove_is_recursive(base: str) -> None:
    source, dest = storage.join(base, "from", "x"), storage.join(base, "to", "y")
    storage.write(source, b"1")
    for _ in range(2):
        storage.move(source, dest)
    assert [path for path, _ in listed(base)] == ["to/y"]
    storage.remove(base)
    assert listed(base) == []


def test_files_are_copied_completely(base: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(bytes(range(256)) * 50_000)
    storage.upload_file(tmp_path / "up", storage.join(base, "big"))
    storage.download_file(storage.join(base, "big"), tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()


def test_a_missing_object_is_a_one_line_error(base: str) -> None:
    with pytest.raises(StorageError, match="nowhere") as caught:
        storage.read(storage.join(base, "nowhere"))
    assert "\n" not in str(caught.value)


def test_64_threads_can_read_first(s3: str) -> None:
    uri = storage.join(s3, "cold")
    storage.write(uri, b"data")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.cold_readers", uri, "10"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_other_schemes_are_rejected() -> None:
    with pytest.raises(StorageError, match="gs:// is not supported"):
        storage.read("gs://bucket/key")


def test_wrong_credentials_are_rejected_by_the_server(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(storage.join(s3, "secret"), b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with fresh_clients(), pytest.raises(StorageError):
        storage.read(storage.join(s3, "secret"))


def test_a_profile_selects_another_s3_server(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write(storage.join(s3, "profiles", "x"), b"there")
    (tmp_path / "config").write_text(
        f"[profile other]\nregion = us-east-1\nendpoint_url = {os.environ['AWS_ENDPOINT_URL_S3']}\n"
        f"aws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    other = s3.replace("s3://", "s3://other@")
    with fresh_clients():
        assert storage.read(storage.join(other, "profiles", "x")) == b"there"
        assert listed(storage.join(other, "profiles")) == [("x", 5)]
        with pytest.raises(StorageError):
            storage.head(storage.join(s3, "profiles", "x"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    (tmp_path / "model" / "sub" / "config").write_bytes(b"config")
    return tmp_path / "model"


def test_a_published_folder_is_fetched_with_its_metadata(base: str, folder: Path) -> None:
    uri = manifest.publish_folder(folder, base, step=3)
    assert manifest.latest_version(base) == uri
    assert (manifest.fetch_folder(uri) / "sub" / "config").read_bytes() == b"config"
    assert manifest.read_manifest(uri)["step"] == 3
    assert manifest.manifest_sha256(uri).startswith(uri.rpartition("/")[2])


def test_publishing_again_keeps_the_first_version(base: str, folder: Path) -> None:
    first = manifest.publish_folder(folder, base)
    (folder / "weights").write_bytes(b"other")
    second = manifest.publish_folder(folder, base)
    assert (manifest.fetch_folder(first) / "weights").read_bytes() == b"weights"
    assert (manifest.fetch_folder(second) / "weights").read_bytes() == b"other"
    assert manifest.latest_version(base) == second


def test_a_folder_without_a_manifest_is_ignored(base: str) -> None:
    storage.write(storage.join(base, "weights"), b"weights")
    with pytest.raises(StorageError, match="never published, or its upload did not finish"):
        manifest.fetch_folder(base)


def test_a_changed_file_is_rejected(base: str, folder: Path) -> None:
    uri = manifest.publish_folder(folder, base, fetched="never before")
    storage.write(storage.join(uri, "weights"), b"WEIGHTS")
    with pytest.raises(StorageError, match="weights must have sha256"):
        manifest.fetch_folder(uri)


def test_a_manifest_cannot_write_outside_the_cache(s3: str, folder: Path, tmp_path: Path) -> None:
    uri = manifest.publish_folder(folder, storage.join(s3, tmp_path.name))
    evil = storage.read(storage.join(uri, manifest.FILE)).replace(b'"weights"', b'"../../evil"')
    storage.write(storage.join(uri, manifest.FILE), evil)
    with pytest.raises(StorageError, match="leaves the folder"):
        manifest.fetch_folder(uri)
