"""Downloads from a real server with injected faults, to disk and to a real S3 server."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import storage
from model.data.download import fetch, modelscope
from model.data.download.dataset import Options, download_dataset, verify_download
from model.data.download.fetch import RetryPolicy
from model.data.download.ledger import DONE, Ledger, Outcome, download_status, outcomes
from model.errors import DataError, OutageError
from tests.helpers.faulty_server import ModelScopeHandler, content, serve

QUICK = RetryPolicy(attempts=4, first_wait_s=0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve() as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    return storage.join(request.getfixturevalue("s3"), "downloads", tmp_path.name)


def manifest(folder: Path, server: str, names: list[str], **facts: object) -> str:
    rows = [json.dumps({"url": f"{server}/{name}", "path": name, **facts}) for name in names]
    path = folder / "list.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def options(**changes: object) -> Options:
    return Options(**{"policy": QUICK, **changes})


HEALED = {
    "ok/a-1000": 0,
    "ok/empty-0": 0,
    "ok/文件 b-5000": 0,
    "drop/a-500000": 0,
    "busy/a-3000": 0,
    "ignores/a-90000": 0,
    "changes/a-90000": 1,
    "silent/a-90000": 1,
    "chunked/a-90000": 0,
}
"""Path -> the version of the file that must be stored."""


@pytest.mark.parametrize("in_memory", [fetch.IN_MEMORY, 20_000], ids=["memory", "file"])
def test_files_from_a_faulty_server_match_the_source(
    server: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(fetch, "IN_MEMORY", in_memory)
    with serve() as fresh:  # each fault happens once per server
        raw, facts = download_dataset(manifest(tmp_path, fresh, list(HEALED)), root, "d", options())
    for name, version in HEALED.items():
        assert storage.read(storage.join(raw, name)) == content(name.partition("/")[2], version), name
    assert facts["files_copied"] == len(HEALED)
    rows = {row.path: row for row in outcomes(raw)}
    for name in HEALED:
        data = storage.read(storage.join(raw, name))
        assert (rows[name].status, rows[name].size) == (DONE, len(data))
        assert rows[name].sha256 == hashlib.sha256(data).hexdigest()
    assert {entry.path for entry in storage.walk(raw) if ".ledger" not in entry.path} == set(HEALED)


def test_failed_downloads_are_in_the_ledger_with_a_reason(server: str, root: str, tmp_path: Path) -> None:
    bad = ["gone/a-10", "short/a-1000", "wrong/a-1000"]
    rows = [
        {"url": f"{server}/{name}", "path": name, "sha256": hashlib.sha256(content(name[6:])).hexdigest()}
        for name in ["ok/ab-100", *bad]
    ]
    rows[0]["sha256"] = ""
    rows.append({"url": f"{server}/ok/b-100", "path": "size", "size": 99})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="4 of 5 files could not be downloaded") as caught:
        download_dataset(str(tmp_path / "list.jsonl"), root, "d", options())
    raw = storage.join(root, "raw", "d")
    found = download_status(raw)
    assert found.files == 1
    assert dict(found.failed) == {"http_404": 1, "connection": 1, "sha256": 1, "size": 1}
    assert all(name in str(caught.value) for name in bad)
    assert not any(storage.exists(storage.join(raw, name)) for name in bad)


def test_a_second_run_downloads_only_failed_or_changed_files(server: str, tmp_path: Path) -> None:
    with serve() as fresh:
        names = ["ok/a-1000", "busy/b-1000"]
        source = manifest(tmp_path, fresh, names)
        hasty = options(policy=RetryPolicy(attempts=2, first_wait_s=0.01))
        with pytest.raises(OutageError, match="busy/b-1000: http_503"):  # a busy server is not invalid data
            download_dataset(source, str(tmp_path), "d", hasty)
        _, facts = download_dataset(source, str(tmp_path), "d", hasty)
    assert facts == {"files": 2, "files_copied": 1, "bytes_copied": 1000, "files_failed": 0}
    assert storage.read(str(tmp_path / "raw" / "d" / "busy" / "b-1000")) == content("b-1000")


def test_a_killed_transfer_resumes_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "IN_MEMORY", 1000)
    with serve() as fresh:
        source = manifest(tmp_path, fresh, ["drop/a-200000"])
        one_try = options(policy=RetryPolicy(attempts=1))
        for _ in range(2):  # 70,000 bytes per attempt
            with pytest.raises(OutageError):
                download_dataset(source, str(tmp_path), "d", one_try)
        _, facts = download_dataset(source, str(tmp_path), "d", one_try)
    assert facts["files_copied"] == 1
    assert storage.read(str(tmp_path / "raw" / "d" / "drop" / "a-200000")) == content("a-200000")


def test_partitions_are_disjoint_and_complete(server: str, tmp_path: Path) -> None:
    names = [f"ok/{number}-100" for number in range(40)]
    source = manifest(tmp_path, server, names)
    counts = [download_dataset(source, str(tmp_path), "d", options(index=i, count=3))[1]["files"] for i in range(3)]
    assert sum(counts) == 40
    assert min(counts) > 5
    assert download_status(str(tmp_path / "raw" / "d")).files == 40


def test_only_selected_files_are_downloaded(corpus: Path, tmp_path: Path) -> None:
    raw, _ = download_dataset(str(corpus), str(tmp_path), "d", options(only=["retrieval/*", "videos/retrieval_*"]))
    found = {entry.path.partition("/")[0] for entry in storage.walk(raw)} - {".ledger"}
    assert found == {"retrieval", "videos"}


def test_a_bucket_is_copied_and_then_only_changed_objects(corpus: Path, s3: str, tmp_path: Path) -> None:
    raw, first = download_dataset(str(corpus), storage.join(s3, tmp_path.name), "d")
    copy, second = download_dataset(raw, str(tmp_path), "d")
    assert first["files_copied"] == second["files_copied"] > 100
    storage.write(storage.join(raw, "classname.json"), b"{}")
    assert download_dataset(raw, str(tmp_path), "d")[1]["files_copied"] == 1
    assert storage.read(storage.join(copy, "classname.json")) == b"{}"


def test_the_rate_is_limited_over_all_threads(server: str, tmp_path: Path) -> None:
    source = manifest(tmp_path, server, [f"ok/{number}-100000" for number in range(8)])
    start = time.monotonic()
    download_dataset(source, str(tmp_path), "d", options(rate=800_000))
    assert 0.8 <= time.monotonic() - start < 4


def test_verification_finds_damage_and_the_next_download_repairs_it(server: str, root: str, tmp_path: Path) -> None:
    names = [f"ok/{number}-1000" for number in range(5)]
    source = manifest(tmp_path, server, names)
    raw, _ = download_dataset(source, root, "d", options())
    assert verify_download(raw) == (5, [])
    storage.write(storage.join(raw, names[2]), bytes(1000))
    storage.remove(storage.join(raw, "ok", "3-1000"))
    right, wrong = verify_download(raw)
    assert right >= 3
    assert any(line.startswith("ok/2-1000: sha256") for line in wrong)
    download_dataset(source, root, "d", options())
    assert verify_download(raw) == (5, [])


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("l.csv", "url,path\nhttp://h/a,../../etc/passwd\n", "row 1: the path of a video must stay below"),
        ("l.jsonl", '{"url": "http://h/a", "path": "/abs"}\n', "row 1: the path of a video must stay below"),
        ("l.txt", "ftp://h/a\n", "row 1: url must begin with http"),
        ("l.txt", "http://h/%2e%2e/%2e%2e/a\n", "row 1: the path of a video must stay below"),
        ("l.csv", "link\nhttp://h/a\n", "must have a column url, it has link"),
        (
            "l.csv",
            "url,path\nhttp://h/a,x\nhttp://h/b,x\n",
            "each path must name one file; rows 1 and 2 have the same path",
        ),
        ("l.jsonl", '{"path": "x"}\n', "row 1: 'url'"),
        ("l.csv", "url,size\nhttp://h/a,big\n", "row 1: invalid literal"),
        ("l.csv", "path,url\na.mp4\n", "row 1: "),
        ("l.csv", "url,path\nhttp://h/a,.ledger/x.parquet\n", "row 1: the path of a video must"),
        ("l.csv", "url,path\nhttp://h/a,./x.mp4\n", "row 1: the path of a video must"),
        ("l.jsonl", '{"url": \n', "cannot be read after row 0"),
        ("l.csv", "url,path\nhttp://h/a,标题\n".encode("gb18030"), "must be UTF-8"),
    ],
)
def test_an_invalid_list_is_rejected_before_any_download(
    tmp_path: Path, name: str, text: str | bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=complaint):
        download_dataset(str(tmp_path / name), str(tmp_path / "out"), "d", options())
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["lock"]


def test_status_works_during_a_download(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), "writer")
    for number in range(5):
        ledger.add(Outcome(path=f"{number}", identity="", status=DONE, size=1))
    ledger.close()
    found = outcomes(str(tmp_path))
    first = next(found)
    ledger.add(Outcome(path="0", identity="", status="failed"))
    ledger.close()
    assert [first.path, *(row.path for row in found)] == ["0", "1", "2", "3", "4"]
    assert download_status(str(tmp_path)).files == 4


def test_a_partition_is_downloaded_by_one_process_at_a_time(server: str, tmp_path: Path) -> None:
    source = manifest(tmp_path, server, ["ok/a-10"])
    spool = tmp_path / "raw" / "d" / ".ledger" / "arriving" / "1of1"
    spool.mkdir(parents=True)
    with (spool / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is downloading this partition"):
            download_dataset(source, str(tmp_path), "d", options())


def test_an_impossible_file_name_is_in_the_ledger(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name: "):
        download_dataset(manifest(tmp_path, server, ["ok/" + "长" * 90 + "-10"]), str(tmp_path), "d", options())
    assert dict(download_status(str(tmp_path / "raw" / "d")).failed) == {"name": 1}


def test_a_folder_without_annotations_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold annotation files"):
        download_dataset(str(tmp_path), str(tmp_path / "out"))


def test_signatures_in_urls_are_not_in_ledger_or_messages(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.mp4?Signature=SECRET&security-token=SECRET\n")
    with pytest.raises(OutageError, match=r"a\.mp4: connection") as caught:
        download_dataset(str(tmp_path / "list.txt"), str(tmp_path), "d", options())
    (row,) = outcomes(str(tmp_path / "raw" / "d"))
    assert "SECRET" not in f"{caught.value}{row}"
    assert row.identity == "http://127.0.0.1:9/a.mp4"


def test_a_folder_without_a_ledger_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no download ledger"):
        download_status(str(tmp_path))


REPOSITORY = {
    "README.md": b"# data",
    "classname.json": b"{}",
    "retrieval/train.csv": "clip_name:FILE,caption\nvideos/a.mp4,猫\nvideos/b.flv,狗\nvideos/lost.mp4,鸟\n".encode(),
    "retrieval/val.csv": "clip_name:FILE,caption\nvideos/a.mp4,黑猫\n".encode(),
    **{f"notes/{number:03d}.txt": b"x" for number in range(250)},
}
OBJECTS = {"public-zip/data/videos/a.mp4": b"A" * 1000, "public/data/videos/b.flv": b"B" * 2000}


def test_modelscope_lists_the_repository_and_annotated_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(ModelScopeHandler, repository=REPOSITORY, objects=OBJECTS) as address:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        monkeypatch.setattr(modelscope, "OSS_HOST", address + "/bucket")
        with pytest.raises(DataError, match=r"videos/lost\.mp4: http_404"):
            download_dataset("modelscope://owner/name", str(tmp_path), options=options())
        raw = str(tmp_path / "raw" / "youku-mplug")
        for name, data in REPOSITORY.items():
            assert storage.read(storage.join(raw, name)) == data
        for name, data in OBJECTS.items():
            assert storage.read(storage.join(raw, name.partition("data/")[2])) == data
        assert download_status(raw).files == len(REPOSITORY) + len(OBJECTS)
        with pytest.raises(DataError, match=r"ModelScope refused owner/other: no such dataset\."):
            download_dataset("modelscope://owner/other", str(tmp_path), options=options())


def test_signed_urls_equal_those_of_alibabas_client() -> None:
    key = {
        "AccessId": "AKID",
        "AccessSecret": "SECRET",
        "SecurityToken": "TOKEN+/=",
        "Bucket": "dataset-hub",
        "Region": "oss-cn-hangzhou",
    }
    url = modelscope.signed_url(key, "public-zip/modelscope/Youku-AliceMind/master", "videos/a b+中.mp4", 1_700_000_000)
    assert url.startswith("https://dataset-hub.oss-cn-hangzhou.aliyuncs.com/public-zip/modelscope/")
    assert "Signature=mtsY3hAtTkNqCxww7O0D4zeyjog%3D" in url  # recorded from oss2 2.19 for the same input
