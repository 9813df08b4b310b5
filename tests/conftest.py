"""Shared fixtures: a corpus, its shards, a tokenizer, an S3 server. None is a mock."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: otherwise parallel test processes compete for cores

import pytest
from filelock import FileLock

from tests.helpers.killing import Outcome, Training
from tests.helpers.running import train

# background jobs of a shell ignore it, and so do their children
signal.signal(signal.SIGINT, signal.default_int_handler)


collect_ignore = [] if "MPLUG_E2E" in os.environ else ["e2e"]
"""Needs a cluster: `make e2e-cluster`."""


LONGEST = (
    "demo",
    "backend",
    "production",
    "pipelines",
    "plan",
    "launch",
    "recovery",
    "training",
    "kills",
    "tracking",
    "validation",
)
"""Longest test files first, so that parallel test processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MPLUG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


Make = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder shared by all test processes, for fixtures that take long to create."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared: Path) -> Make:
    """Calls `make` once per test run, with a lock, and stores its JSON value for the other test processes."""

    def get(name: str, make: Callable[[], Any]) -> Any:
        found = shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not found.exists():
                found.write_text(json.dumps(make()))
        return json.loads(found.read_text())

    return get


@pytest.fixture(scope="session")
def corpus(shared: Path, once: Make) -> Path:
    """A synthetic Youku-mPLUG of about 120 clips."""
    from model.data.synthetic.corpus import synthesize_corpus

    return Path(once("corpus", lambda: str(synthesize_corpus(shared / "source", seed=1, scale=0.05))))


@pytest.fixture(scope="session")
def shards(corpus: Path, shared: Path, once: Make) -> dict[str, str]:
    """URI of the shards of each dataset."""
    from model.data.annotations import DATASETS
    from model.data.shards.build import ShardSettings
    from model.data.shards.commit import build_shards
    from model.data.shards.format import Form

    form = Form(num_frames=8, short_side=72)
    settings = {name: ShardSettings(raw=str(corpus), root=str(shared), dataset=name, form=form) for name in DATASETS}
    return once("shards", lambda: {name: build_shards(each) for name, each in settings.items()})


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, shared: Path, once: Make) -> str:
    """URI of a tokenizer trained on the corpus."""
    from model.tasks.language_modeling import publish_tokenizer

    return once("tokenizer", lambda: publish_tokenizer(str(corpus), str(shared), vocab_size=448))


@pytest.fixture(scope="session")
def decoder(shards: dict[str, str], tokenizer: str, shared: Path, once: Make) -> str:
    """URI of a decoder that `mplug train` trained for two steps."""
    settings = [f"model.decoder={tokenizer}", f"data.shards={shards['pretrain']}"]
    return once("decoder", lambda: train("tiny_decoder", shared, settings))


@pytest.fixture(scope="session")
def pretrained(shards: dict[str, str], decoder: str, shared: Path, once: Make) -> str:
    """URI of a model that was pre-trained for two steps on two processes."""
    settings = [f"model.decoder={decoder}", f"data.shards={shards['pretrain']}", "training.precision=bf16"]
    return once("pretrained", lambda: train("tiny_pretraining", shared, settings, processes=2))


@pytest.fixture(scope="session")
def instructed(corpus: Path, shards: dict[str, str], shared: Path, once: Make) -> str:
    """URI of an mPLUG-Owl that was trained on conversations for two steps on two processes."""
    from model.tasks.language_modeling import publish_tokenizer

    def make() -> str:
        tokenizer = publish_tokenizer(str(corpus), str(shared), vocab_size=448, dataset="instruction")
        settings = [f"model.decoder={tokenizer}", f"data.shards={shards['instruction']}"]
        return train("tiny_instruction", shared, settings, processes=2)

    return once("instructed", make)


@pytest.fixture(scope="session")
def models(pretrained: str, decoder: str, shards: dict[str, str], shared: Path, once: Make) -> dict[str, str]:
    """A model for each task, with a head that was not trained."""
    from tests.helpers.publishing import publish_untrained

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


@pytest.fixture(scope="session")
def undisturbed(shards: dict[str, str], decoder: str, shared: Path, once: Make) -> Outcome:
    """An undisturbed run with two processes."""
    settings = [f"data.shards={shards['pretrain']}", f"model.decoder={decoder}"]
    outcome = Outcome(**once("undisturbed", lambda: asdict(Training(shared / "undisturbed", settings).run())))
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a real S3 server; its credentials are in the environment."""
    from cli.services import BUCKET, object_storage

    before = dict(os.environ)
    with object_storage(tmp_path_factory.mktemp("s3")):
        yield f"s3://{BUCKET}/tests"
    os.environ.clear()
    os.environ.update(before)
