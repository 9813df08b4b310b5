from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.jobs.client import Cluster
from components.jobs.manifests import render_job
from tests.helpers.fake_kube import FakeKube, fake_kube
from tests.helpers.jobs import LAUNCH
from tests.helpers.pod_templates import CPU


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("components.jobs.client.FIRST_WAIT_S", 0.02)
    monkeypatch.setattr("components.jobs.launcher.CHECK_EVERY_S", 1)
    with fake_kube(tmp_path / "kubeconfig") as server:
        yield server


@pytest.fixture
def cluster(kube: FakeKube) -> Cluster:
    return Cluster(patience_s=3)


@pytest.fixture
def job() -> list[dict[str, Any]]:
    return render_job(LAUNCH, CPU, "mplug")
