"""A cluster on this machine, if none is configured: a real API server, kubelet and containerd, started by $CLUSTER_SH.

This module adds the missing parts: images, DNS names, volumes, and a double of the operator.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers.paths import ROOT

CLUSTER_SH = Path(os.environ.get("CLUSTER_SH", ROOT.parent / "shared" / "tools" / "cluster" / "cluster.sh"))
BINARIES = Path.home() / ".cache" / "k8s-1.20" / "bin" / "kubelet"
KUBECONFIG = Path("/run/k8s-1.20/kubeconfig")
IMAGES = {
    "localhost/mplug-video/training:0.1.0": "",
    "localhost/mplug-video/mlflow:0.1.0": "",
    "docker.io/chrislusf/seaweedfs:4.48": "seaweedfs",
    "docker.io/library/postgres:17.6-bookworm": "postgres",
}
GATEWAY = "10.244.0.1"
"""Address in the pod network, and the DNS server that kubelet configures in pods."""
VOLUMES = {"postgres": ("1Gi", 999), "seaweedfs": ("50Gi", 10001)}

LABELS = {"app": "training-operator"}
OPERATOR = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "training-operator", "namespace": "kubeflow"},
    "spec": {
        "replicas": 0,
        "selector": {"matchLabels": LABELS},
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {"containers": [{"name": "training-operator", "image": "training-operator:1.9.4"}]},
        },
    },
}
"""The operator's Deployment without pods: k8s/README.md patches it, and the double reads it."""


def kubectl(*arguments: str, check: bool = True, stdin: str = "") -> str:
    ended = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, input=stdin, timeout=600)
    assert not check or ended.returncode == 0, f"kubectl {' '.join(arguments)}: {ended.stdout}{ended.stderr}"
    return ended.stdout


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    if not CLUSTER_SH.exists():
        return f"no cluster is configured, and {CLUSTER_SH} does not exist"
    if not BINARIES.exists():
        return f"no cluster is configured, and {BINARIES} has not been built: {CLUSTER_SH.with_name('build_k8s.sh')}"
    for program in ("podman", "ctr", "dnsmasq"):
        if not shutil.which(program):
            return f"no cluster is configured, and {program} is not installed"
    for image, stand_in in IMAGES.items():
        if not stand_in and subprocess.run(["podman", "image", "exists", image]).returncode:
            return f"{image} is not built: make images"
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Starts the cluster and configures kubectl and this process for it."""
    archive = folder / "images.tar"
    _save_images(archive)
    subprocess.run([CLUSTER_SH, "down"], capture_output=True)
    before = dict(os.environ)
    os.environ["KUBECONFIG"] = str(KUBECONFIG)
    try:
        with (folder / "cluster.log").open("w") as log, ExitStack() as running:
            environment = {**os.environ, "IMAGES": str(archive)}
            subprocess.run([CLUSTER_SH, "up"], check=True, stdout=log, stderr=log, env=environment)
            archive.unlink()
            crd = CLUSTER_SH.parents[2] / "reference" / "pytorchjob-crd-v1.9.0.yaml"
            kubectl("create", "--validate=false", "-f", str(crd))
            kubectl("create", "namespace", "kubeflow")
            kubectl("create", "--validate=false", "-f", "-", stdin=json.dumps(OPERATOR))
            kubectl("apply", "--validate=false", "-k", str(ROOT / "k8s" / "operator"))
            patch = ["--patch-file", str(ROOT / "k8s" / "operator" / "mount.yaml")]
            kubectl("--namespace", "kubeflow", "patch", "deployment", "training-operator", *patch)
            _make_volumes(folder)
            running.enter_context(_names(folder))
            double = [sys.executable, "-m", "tests.helpers.operator_double", "mplug"]
            os.environ["INIT_IMAGE"] = next(iter(IMAGES))
            running.enter_context(_process(double, folder / "operator.log"))
            yield
    finally:
        subprocess.run([CLUSTER_SH, "down"], capture_output=True)
        os.environ.clear()
        os.environ.update(before)


def _save_images(archive: Path) -> None:
    flags = os.environ.get("BUILD_FLAGS", "").split()
    for image, stand_in in IMAGES.items():
        if stand_in:
            file = f"{stand_in}.Dockerfile"
            command = ["podman", "build", *flags, "--file", file, "--tag", image, "."]
            subprocess.run(command, check=True, cwd=ROOT / "tests" / "e2e")
    subprocess.run(["podman", "pod", "create", "--name", "mplug-pause"], capture_output=True)  # builds the pause image
    subprocess.run(["podman", "pod", "rm", "--force", "mplug-pause"], capture_output=True)
    pause = "localhost/podman-pause:4.3.1-0"
    subprocess.run(["podman", "save", "--quiet", "-m", "-o", archive, *IMAGES, pause], check=True)


def _make_volumes(folder: Path) -> None:
    """Creates a volume for each claim of the overlay, since nothing provisions them."""
    for name, (size, owner) in VOLUMES.items():
        path = folder / "volumes" / name
        path.mkdir(parents=True)
        os.chown(path, owner, owner)
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": size},
                "accessModes": ["ReadWriteOnce"],
                "hostPath": {"path": str(path)},
                "claimRef": {"namespace": "mplug", "name": f"data-{name}-0"},
            },
        }
        kubectl("apply", "--validate=false", "-f", "-", stdin=json.dumps(volume))


@contextmanager
def _names(folder: Path) -> Iterator[None]:
    """Resolves service names to ready pods, because there is no kube-proxy."""
    hosts, stopped = folder / "hosts", threading.Event()
    hosts.touch()
    command = [
        "dnsmasq",
        "--no-daemon",
        "--no-resolv",
        "--no-hosts",
        f"--addn-hosts={hosts}",
        "--local=/cluster.local/",
        f"--listen-address={GATEWAY}",
        "--bind-dynamic",
        "--user=root",
        "--pid-file=",
    ]
    with _process(command, folder / "dnsmasq.log") as server:

        def keep() -> None:
            while not stopped.wait(0.5):
                found = kubectl("--namespace", "mplug", "get", "endpoints", "-o", "json", check=False)
                lines = [
                    f"{address['ip']} {item['metadata']['name']}.mplug.svc.cluster.local"
                    for item in json.loads(found or '{"items": []}')["items"]
                    for subset in item.get("subsets") or []
                    for address in subset.get("addresses") or []
                ]
                text = "\n".join(sorted(lines)) + "\n"
                if text != hosts.read_text():
                    hosts.write_text(text)
                    server.send_signal(signal.SIGHUP)

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            stopped.set()
            keeper.join()


@contextmanager
def _process(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
    time.sleep(0.5)
    assert child.poll() is None, log.read_text()
    try:
        yield child
    finally:
        child.terminate()
        child.wait()
