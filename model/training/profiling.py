"""`--profile`: a trace of a few steps for https://ui.perfetto.dev or Chrome."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from model import storage
from model.config.schema import RunConfig
from model.distributed import Processes

log = logging.getLogger("mplug")
WAIT, WARM_UP, ACTIVE = 5, 1, 3
"""Steps that are skipped, that warm up the profiler, and that are recorded."""


@contextmanager
def profiled(config: RunConfig, group: Processes) -> Iterator[Callable[[], None]]:
    """A function to call after every step. It records a profile on the first process, if one is requested."""
    if not (config.training.profile and group.is_main):
        yield lambda: None
        return
    uri = storage.join(config.output, "profiles", f"{config.name}.json.gz")

    def publish(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(path))
            storage.upload_file(path, uri)
        log.info("profile of %d steps: %s", ACTIVE, uri)

    plan = schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
    with profile(schedule=plan, on_trace_ready=publish, record_shapes=True) as profiler:
        yield profiler.step
