"""The upload APIs of Hugging Face with its Xet storage, and of ModelScope, as their own clients call them.

Repositories must exist before a commit, tokens must be right, and a commit may only name content that was uploaded.
"""

import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hub-token"


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.visibility: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes | str]] = {}
        """Of each repository: small files, and the hashes of large ones."""
        self.stored: set[str] = set()
        """Hashes of large files that can be committed."""
        self.uploaded = 0
        """Bytes of large files that were received."""
        self.holds_commits = False
        self.commit_arrived = threading.Event()

    def commit(self, repo: str, files: dict[str, bytes | str]) -> bool:
        """False if the repository or the content of a large file is missing."""
        large = {value for value in files.values() if isinstance(value, str)}
        if repo not in self.visibility or not large <= self.stored:
            return False
        self.files.setdefault(repo, {}).update(files)
        return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", "Bearer xet"):
            return self._answer(401, {"error": "Invalid username or password.", "Message": "Invalid token"})
        if "/commit/" in self.path and self.server.holds_commits:
            self.server.commit_arrived.set()
            self.close_connection = True
            return threading.Event().wait(30) and None
        find = self._modelscope if self.path.startswith(("/api/v1/", "/openapi/", "/lfs/")) else self._huggingface
        return self._answer(*find(self.path.partition("?")[0], body))

    def _huggingface(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                exists = repo in self.server.visibility
                self.server.visibility.setdefault(repo, asked["visibility"])
                return 409 if exists else 200, {"url": f"{self.server.url}/{repo}"}
            case ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case ["api", "models", owner, name, "preupload", _]:
                known = self.server.files.get(f"{owner}/{name}", {})
                return 200, {"files": [_preupload(each["path"], known) for each in json.loads(body)["files"]]}
            case ["api", "models", _, _, "xet-write-token", _]:
                return 200, {"casUrl": f"{self.server.url}/cas", "accessToken": "xet", "exp": 9_999_999_999}
            case ["cas", "v1", "xorbs", _, _]:
                self.server.uploaded += len(body)
                return 200, {"was_inserted": True}
            case ["cas", "v2", "shards"]:
                self.server.stored |= set(_hashes(body))
                return 200, {"type": "result", "result": 1}
            case ["api", "models", owner, name, "commit", _]:
                lines = [json.loads(line) for line in body.splitlines()]
                small = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                large = {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
                if not self.server.commit(f"{owner}/{name}", {**small, **large}):
                    return 400, {"error": "content is missing"}
                return 200, {"commitUrl": f"{self.server.url}/{owner}/{name}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": "not found"}

    def _modelscope(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        match path.strip("/").split("/"):
            case ["api", "v1", "models"]:
                asked = json.loads(body)
                repo = f"{asked['Path']}/{asked['Name']}"
                if repo in self.server.visibility:
                    return 400, {"Code": 10010101001, "Success": False, "Message": "model exists"}
                self.server.visibility[repo] = str(asked["Visibility"])
                return 200, {"Success": True, "Data": {"Path": asked["Path"], "Name": asked["Name"]}}
            case ["api", "v1", "models", owner, name] | ["openapi", "v1", "models", owner, name]:
                exists = f"{owner}/{name}" in self.server.visibility
                return (200 if exists else 404), {
                    "success": exists,
                    "Success": exists,
                    "data": {"id": f"{owner}/{name}"},
                }
            case ["api", "v1", "repos", "models", _, _, "info", "lfs", "objects", "batch"]:
                missing = [each for each in json.loads(body)["objects"] if each["oid"] not in self.server.stored]
                actions = [
                    {"oid": each["oid"], "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                    for each in missing
                ]
                return 200, {"Success": True, "Data": {"objects": actions}}
            case ["lfs", oid]:
                self.server.uploaded += len(body)
                self.server.stored.add(oid)
                return 200, {"Success": True}
            case ["api", "v1", "repos", "models", owner, name, "commit", _]:
                actions = json.loads(body)["actions"]
                files: dict[str, bytes | str] = {
                    each["path"]: each["sha256"] if each["type"] == "lfs" else base64.b64decode(each["content"])
                    for each in actions
                }
                done = self.server.commit(f"{owner}/{name}", files)
                return (200 if done else 400), {"Success": done, "Message": "" if done else "content is missing"}
        return 404, {"Success": False, "Message": "not found"}

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _preupload(path: str, known: dict[str, bytes | str]) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    oid = known.get(path)
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if isinstance(oid, str) else {})}


def _hashes(shard: bytes) -> Iterator[str]:
    """Every aligned field of a shard that may be a SHA-256, in both orders of its bytes."""
    for place in range(0, len(shard) - 31, 4):
        field = shard[place : place + 32]
        yield field.hex()
        yield struct.pack(">4Q", *struct.unpack("<4Q", field)).hex()


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
