from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kube import FakeKube, fake_kube
from jobs import LAUNCH
from shapes import CPU

from components.cluster import Cluster
from components.manifests import render


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("components.cluster.FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("components.launcher.LOOK_EVERY_S", 1)
    with fake_kube(tmp_path / "kubeconfig") as server:
        yield server


@pytest.fixture
def cluster(kube: FakeKube) -> Cluster:
    return Cluster(patience_s=3)


@pytest.fixture
def job() -> list[dict[str, Any]]:
    return render(LAUNCH, CPU, "mplug")
