"""What Prometheus and a pod's liveness probe read: http://…:$MPLUG_METRICS_PORT/metrics, where that variable is set.

The first process of each node serves it; the numbers of the run are at the first node's.
"""

import logging
import os
import socket
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, start_http_server

log = logging.getLogger("mplug")
PORT = "MPLUG_METRICS_PORT"

EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
"""All addresses, of IPv6 too where the kernel has it."""


class Exporter:
    """The newest value of every metric."""

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
        """`train/loss` becomes mplug_train_loss{run="…"}; the step itself is mplug_step."""
        for name, value in {**values, "step": float(step)}.items():
            if name not in self.gauges:
                known = "mplug_" + "".join(letter if letter.isalnum() else "_" for letter in name)
                self.gauges[name] = Gauge(known, f"{name} of a run", ["run"], registry=self.registry)
            self.gauges[name].labels(self.run).set(value)
