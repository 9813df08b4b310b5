"""A real MLflow server behind a proxy that tests can make unavailable, slow, or return 500 or a web page."""

import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from cli.services import free_ports, run_process

Mode = Literal["up", "down", "500", "slow", "lost answers", "a page"]


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        server: Unreliable = self.server  # type: ignore[assignment]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if server.mode == "down":
            self.close_connection = True
            return
        if server.mode == "slow":
            time.sleep(0.6)
        match server.mode:
            case "500":
                status, answer = 500, b"{}"
            case "a page":  # like a proxy that requires a login
                status, answer = 200, b"<html>Sign in</html>"
            case _:
                status, answer = self._forward(server.target, body)
        if server.mode == "lost answers":  # the server has processed the request, but its response is lost
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _forward(self, target: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
        request = urllib.request.Request(target + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


class Unreliable(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.target, self.mode = target, "up"
        self.uri = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def mlflow_server(folder: Path) -> Iterator[Unreliable]:
    port = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with run_process(command, folder / "mlflow.log", quiet):
        target = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{target}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        proxy = Unreliable(target)
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
