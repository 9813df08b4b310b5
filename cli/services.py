"""The S3 server and MLflow of the demo. Both listen on this machine only, with credentials, and stop with the demo."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from model import storage
from model.errors import StageError

BUCKET = "mplug"
START_S, STOP_S = 90.0, 20.0
GRPC_OFFSET = 10_000  # SeaweedFS serves gRPC this far above each of its ports
WEED_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")


@dataclass(frozen=True, kw_only=True)
class LocalServices:
    """Ports and credentials of a demo folder. They are kept, because cached stages depend on the addresses."""

    weed_port: int
    """First of four consecutive ports."""
    mlflow_port: int
    access_key: str
    secret_key: str

    @property
    def tracking_uri(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def environment(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self.weed_port + WEED_PORTS.index('s3.port')}"
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": endpoint,
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
        }


def local_services(folder: Path) -> LocalServices:
    """The settings of a folder, generated on first use and readable by the user only."""
    path = folder / "services.json"
    if path.exists():
        return LocalServices(**json.loads(path.read_text(encoding="utf-8")))
    services = LocalServices(
        weed_port=free_ports(len(WEED_PORTS)),
        mlflow_port=free_ports(1),
        access_key=secrets.token_hex(8),
        secret_key=secrets.token_hex(20),
    )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(asdict(services)), encoding="utf-8")
    partial.rename(path)
    return services


@contextmanager
def object_storage(folder: Path) -> Iterator[LocalServices]:
    """Runs the S3 server during the block, and points the environment of this process to it."""
    services = local_services(folder)
    os.environ.update(services.environment())
    log = folder / "s3.log"
    with run_process(_weed(folder, services), log, {"GOMEMLIMIT": "400MiB"}) as server:
        # the health page answers before the server can store objects
        _wait(server, lambda: storage.write(f"s3://{BUCKET}/ready", b""), log)
        yield services


@contextmanager
def run_services(folder: Path) -> Iterator[LocalServices]:
    """Runs S3 and MLflow during the block."""
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX": f"^s3://{BUCKET}/",  # versions only point to our bucket
    }
    log = folder / "mlflow.log"
    with object_storage(folder) as services, run_process(_mlflow(folder, services), log, settings) as server:
        _wait(server, lambda: urllib.request.urlopen(f"{services.tracking_uri}/health", timeout=2).close(), log)
        yield services


def _weed(folder: Path, services: LocalServices) -> list[str]:
    data = folder / "s3"
    data.mkdir(parents=True, exist_ok=True)
    ports = [f"-{name}={services.weed_port + offset}" for offset, name in enumerate(WEED_PORTS)]
    return [
        str(Path(sys.executable).with_name("weed")), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        *ports, "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false",
    ]  # fmt: skip


def _mlflow(folder: Path, services: LocalServices) -> list[str]:
    return [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(services.mlflow_port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    ]  # fmt: skip


@contextmanager
def run_process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a child process in a new session. Ends it and all its descendants after the block."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        yield child
    finally:
        stop_process(child)


def stop_process(child: subprocess.Popen[bytes]) -> None:
    """Sends SIGTERM to the process tree, and SIGKILL after a while. A second Ctrl-C does not interrupt this.

    The tree and not the process group: workers of torchrun are in another session.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        _, tree = psutil.wait_procs(tree, timeout=STOP_S)
    child.wait()
    signal.signal(signal.SIGINT, previous)


def _wait(server: subprocess.Popen[bytes], ready: Callable[[], None], log: Path) -> None:
    """Calls `ready` until it succeeds, while the server runs."""
    deadline = time.monotonic() + START_S
    while True:
        if server.poll() is not None:
            raise StageError(f"{log.stem} failed to start, perhaps because its port is in use; see {log}.")
        try:
            ready()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StageError(f"{log.stem} did not start within {START_S:.0f} s; see {log}.") from error
            time.sleep(0.3)


def free_ports(count: int) -> int:
    """First of `count` consecutive free ports whose gRPC ports are free as well."""
    for _ in range(100):
        # gRPC ports below 32768, where the ephemeral ports of the system start
        first = 10_000 + secrets.randbelow(12_000)
        if all(_is_free(port + offset) for port in range(first, first + count) for offset in (0, GRPC_OFFSET)):
            return first
    raise StageError("no free ports found between 10000 and 32000.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
