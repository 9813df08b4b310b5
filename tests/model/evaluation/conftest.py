"""Models to evaluate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.publishing import publish_untrained


@pytest.fixture(scope="session")
def models(
    pretrained: str, decoder: str, shards: dict[str, str], shared: Path, once: Callable[[str, Callable[[], Any]], Any]
) -> dict[str, str]:
    """A model for each task, with a head that was not trained."""
    start = [f"model.init_from={pretrained}", f"model.decoder={decoder}"]
    presets = {
        "classification": ("classification", "tiny_classification", []),
        "retrieval": ("retrieval", "tiny_retrieval", []),
        "matching": ("retrieval", "tiny_retrieval", ["task=matching", "data.max_length=80"]),
        "captioning": ("captioning", "tiny_captioning", []),
    }

    def make() -> dict[str, str]:
        return {
            task: publish_untrained(
                preset, [*start, f"data.shards={shards[dataset]}", *more], shared / "untrained" / task
            )
            for task, (dataset, preset, more) in presets.items()
        }

    return once("untrained", make)
