"""The released presets with the settings of a cluster: from S3, with loader processes, killed and resumed.

Only the sizes of the networks, the length of the run and the number of processes differ: one process trains with the
batch of one of the 8 GPUs of a preset, with two loader processes.
"""

import json
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest

from model import manifest, storage
from model.config.load import list_presets, load_config
from model.config.schema import TASK_DATASETS
from model.data.shards.build import ShardSettings
from model.data.shards.commit import build_shards
from model.data.shards.format import Form
from model.data.shards.reader import ShardReader
from model.evaluation.results import Evaluation, load_evaluation
from model.evaluation.runner import evaluate_model
from model.mplug_owl_video import MplugOwlProcessor
from model.mplug_video import MPlugVideoConfig
from model.tasks import task_class
from tests.helpers.copying import copied
from tests.helpers.killing import Training, workers
from tests.helpers.paths import MPLUG

SIZES = [
    "model.vision.image_size=64",
    "model.vision.patch_size=16",
    "model.vision.hidden_size=128",
    "model.vision.num_hidden_layers=4",
    "model.vision.num_attention_heads=4",
    "model.num_queries=8",
    "model.text={}",
]
LENGTH = ["training.steps=3", "optim.warmup_steps=1", "training.log_every=1", "checkpoint.every=1"]
GPUS = 8
RELEASED = [name for name in list_presets() if not name.startswith("tiny_")]


@pytest.fixture(scope="module")
def bases(decoder: str, pretrained: str, instructed: str, s3: str) -> dict[str, str]:
    """The weights that a task starts from."""
    found = {"pretraining": ("decoder", decoder), "instruction": ("init_from", instructed)}
    found |= {task: ("init_from", pretrained) for task in TASK_DATASETS if task not in found}
    copies = {uri: copied(uri, storage.join(s3, "production", Path(uri).parent.name)) for _, uri in found.values()}
    return {task: f"model.{field}={copies[uri]}" for task, (field, uri) in found.items()}


@pytest.fixture(scope="module")
def stored(corpus: Path, shards: dict[str, str], s3: str) -> Callable[[str, str], str]:
    """URI of the shards on S3, by dataset and form."""

    @cache
    def store(dataset: str, form: str) -> str:
        root = storage.join(s3, "production", form)
        if form == "frames":
            return copied(shards[dataset], storage.join(root, dataset))
        return build_shards(ShardSettings(raw=str(corpus), root=root, dataset=dataset, form=Form(kind=form)))

    return store


@pytest.mark.parametrize(("preset", "form"), zip(RELEASED, cycle(["frames", "original"]), strict=False))
def test_a_released_preset_trains_from_s3_and_resumes(
    preset: str, form: str, stored: Callable[[str, str], str], bases: dict[str, str], s3: str, tmp_path: Path
) -> None:
    config = load_config(preset, ["data.shards=unused", "model.decoder=unused"])
    task, share = config.task, config.data.batch_size // GPUS
    root, shards = storage.join(s3, "production", preset, form), stored(TASK_DATASETS[task], form)
    settings = [*SIZES, "data.workers=2", f"data.batch_size={share}", f"data.shards={shards}", bases[task]]
    if task == "instruction":
        settings.append("model.vision.num_hidden_layers=2")
    run = Training(root, settings, preset, LENGTH)
    outcome = run.interrupted(lambda child: workers(child)[0].kill(), step=1, processes=1)
    assert outcome.code == 0, outcome.stderr
    assert outcome.model.startswith(root)
    assert "restarting in" in outcome.stderr
    assert [point["step"] for point in outcome.history] == [1, 2, 3]
    assert {point["data/read_failures"] for point in outcome.history} == {0.0}
    folder, num_frames = manifest.fetch_folder(outcome.model), config.model.vision.num_frames
    if task == "instruction":
        assert MplugOwlProcessor.from_pretrained(folder).num_frames == num_frames
    else:  # also if the initial model has another number of frames
        assert MPlugVideoConfig.from_pretrained(folder).vision_config.num_frames == num_frames
    if task_class(task).metrics:
        found = (
            judged(outcome.model, shards, tmp_path / "evaluation")
            if task == "classification"
            else evaluate_model(outcome.model, shards=shards, overrides=["data.workers=0"])
        )
        assert set(found.scores) >= set(task_class(task).metrics)
        assert len(found.predictions) == len(ShardReader(f"{shards}/val"))
        assert found.pretrained


def judged(model: str, shards: str, out: Path) -> Evaluation:
    """Evaluates the model like `mplug evaluate`."""
    command = [MPLUG, "evaluate", model, shards, "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    evaluation = load_evaluation(str(out))
    assert json.loads(ended.stdout) == evaluation.scores
    return evaluation
