import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest

from cli.services import free_ports
from model.training.exporter import PORT, Exporter
from tests.helpers.paths import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"


def scrape(port: int, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_a_run_exports_the_metrics_of_alerts_and_dashboard(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metric names are those in the history of a real run."""
    point = json.loads((Path(decoder) / "history.jsonl").read_text().splitlines()[-1])
    step = point.pop("step")
    del point["time_ms"]
    port = free_ports(1)
    monkeypatch.setenv(PORT, str(port))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Exporter("pretrain").show(point, step)
    served = scrape(port)
    if socket.has_dualstack_ipv6():
        assert "mplug_step" in scrape(port, "[::1]")
    assert f'mplug_step{{run="pretrain"}} {float(step)}' in served
    asked = {
        name
        for file in ("alerts.yaml", "training.json")
        for name in re.findall(r"\bmplug_\w+", (MONITORING / file).read_text())
    }
    assert len(asked) > 8
    assert {name for name in asked if f"\n{name}{{" not in served} == set()


def test_a_port_in_use_does_not_affect_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PORT, str(free_ports(1)))
    Exporter("first")
    Exporter("second").show({"train/loss": 1.0}, 1)
    assert "metrics are not served" in caplog.text
