from collections.abc import Iterator

import pytest

from model.config.schema import WatchdogConfig
from model.distributed import ALONE, Processes, processes


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ALONE, "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        with processes(WatchdogConfig()) as group:
            yield group
