"""A real HTTP server whose paths select faults, and one with the responses of ModelScope.

/ok/NAME            no fault
/drop/NAME          closes the connection after every 70,000 bytes
/busy/NAME          429, 503 and 500 before the file
/short/NAME         announces the complete file and sends half
/ignores/NAME       drops once; does not support ranges
/changes/NAME       drops once; then the file and its ETag differ
/silent/NAME        drops once; the file changes without any header showing it
/wrong/NAME         sends different bytes of the right length
/gone/NAME          404
/chunked/NAME       sends no length; drops once
"""

import hashlib
import json
import random
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROP = 70_000


def content(name: str, version: int = 0) -> bytes:
    """The correct bytes of a file; its name ends in its size."""
    return random.Random(f"{name}/{version}").randbytes(int(name.rpartition("-")[2]))


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: Counter[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        _, mode, name = urllib.parse.unquote(self.path).split("/", 2)
        with self.server.lock:  # type: ignore[attr-defined]
            self.seen[self.path] += 1
            turn = self.seen[self.path]
        if mode == "gone":
            return self._answer(404, b"")
        if mode == "busy" and turn <= 3:
            return self._answer((429, 503, 500)[turn - 1], b"", {"Retry-After": "0"})
        version = int(mode in ("changes", "silent") and turn > 1)
        data = content(name, version)
        if mode == "wrong":
            data = bytes(len(data))
        tag = f'"{hashlib.sha256(data).hexdigest()[:12]}"'
        headers = {} if mode in ("silent", "chunked") else {"ETag": tag}
        start, wanted = 0, self.headers.get("Range", "")
        if wanted and mode not in ("ignores", "silent", "chunked") and self.headers.get("If-Range") == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if mode == "drop":
            sent = rest[:DROP]
        elif mode == "short":
            sent = data[start : len(data) // 2]
        elif mode in ("ignores", "changes", "silent", "chunked") and turn == 1:
            sent = rest[: len(rest) // 2]
        else:
            sent = rest
        if mode == "chunked":
            return self._chunks(sent, whole=sent == rest)
        return self._answer(206 if start else 200, sent, {**headers, "Content-Length": str(len(rest))})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if int(headers["Content-Length"]) != len(body):
            self.close_connection = True

    def _chunks(self, body: bytes, *, whole: bool) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 10_000):
            part = body[start : start + 10_000]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True


class ModelScopeHandler(FaultyHandler):
    """The responses that `mplug data download modelscope://owner/name` needs, in the format of the real service."""

    repository: Mapping[str, bytes]
    objects: Mapping[str, bytes]
    """Object keys including their folder; anything else is 404."""

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        if parts[0] == "bucket":
            found = self.objects.get("/".join(parts[1:]))
            is_signed = {"OSSAccessKeyId", "Signature", "Expires", "security-token"} <= set(query)
            self._answer(403 if not is_signed else 200 if found is not None else 404, found or b"")
        elif parts[-1] == "ststoken":
            key = {"AccessId": "i", "AccessSecret": "s", "SecurityToken": "t", "Bucket": "b", "Region": "r"}
            self._data({**key, "Dir": "public-zip/data", "BackupDir": "public/data"})
        elif parts[-1] == "tree":
            page, size = int(query["PageNumber"]), int(query["PageSize"])
            names = sorted(self.repository)[(page - 1) * size : page * size]
            self._data({"Files": [self._file(name) for name in names]})
        elif parts[-1] == "repo":
            self._answer(200, self.repository[query["FilePath"]])
        elif parts == ["api", "v1", "datasets", "owner", "name"]:
            self._data({"Id": 42, "Type": 1})
        else:
            self._answer(200, json.dumps({"Code": 10010205001, "Message": "no such dataset", "Data": None}).encode())

    def _file(self, name: str) -> dict[str, object]:
        data = self.repository[name]
        return {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    def _data(self, data: object) -> None:
        self._answer(200, json.dumps({"Code": 200, "Success": True, "Data": data}).encode())


@contextmanager
def serve(kind: type[FaultyHandler] = FaultyHandler, **attributes: object) -> Iterator[str]:
    """Runs the server and returns its address."""
    handler = type("Handler", (kind,), {"seen": Counter(), **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.lock = threading.Lock()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
