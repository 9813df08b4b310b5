"""Serves metrics for Prometheus and the liveness probe at http://…:$MPLUG_METRICS_PORT/metrics, if the variable is set.

The first process of each node serves them. The metrics of the run are on the first node.
"""

import logging
import os
import socket
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server

log = logging.getLogger("mplug")
PORT = "MPLUG_METRICS_PORT"

EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
"""All addresses, including IPv6 if the kernel supports it."""


class Exporter:
    """Serves the newest value of every metric."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.registry = CollectorRegistry()
        self.gauges: dict[str, Gauge] = {}
        ProcessCollector(registry=self.registry)
        port = os.environ.get(PORT, "")
        if port and os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                start_http_server(int(port), EVERYWHERE, registry=self.registry)
            except OSError as error:
                log.warning("metrics are not served on port %s: %s", port, error.strerror)

    def show(self, values: Mapping[str, float], step: int) -> None:
        """Exports `train/loss` as mplug_train_loss{run="…"} and the step as mplug_step."""
        for name, value in {**values, "step": float(step)}.items():
            if name not in self.gauges:
                known = "mplug_" + "".join(letter if letter.isalnum() else "_" for letter in name)
                self.gauges[name] = Gauge(known, f"{name} of a run", ["run"], registry=self.registry)
            self.gauges[name].labels(self.run).set(value)
