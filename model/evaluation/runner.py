"""Evaluates a published model on one split: `mplug evaluate MODEL SHARDS`."""

import tempfile
from pathlib import Path

import torch

from model import manifest, storage
from model.config.load import load_config, parse_config
from model.config.schema import RunConfig
from model.data.loading.loader import ClipSource, evaluation_batches, on_device, open_split
from model.data.loading.sampler import EverySample
from model.data.shards.build import read_quarantine
from model.data.shards.reader import ShardReader
from model.errors import ConfigError, DataError
from model.evaluation.figures import frame_strip, prediction_figure, save_figure
from model.evaluation.results import Evaluation
from model.progress import progress
from model.tasks.base import Evaluator, Prediction
from model.tasks.build import build_task
from model.tasks.zero_shot import build_zero_shot, zero_shot_config
from model.tracking import Run, tracked

SHOWN = 8
"""Number of clips in the figure of predictions."""
NEAREST = 10
"""Number of clips that are stored for each text."""


def evaluate_model(
    model: str,
    *,
    shards: str,
    split: str = "test",
    preset: str = "",
    batch_size: int = 32,
    tracking: dict[str, str] | None = None,
    with_untuned: bool = False,
    zero_shot: bool = False,
    prompt: str = "",
) -> Evaluation:
    """Scores the model at `model` on <shards>/<split>. Every clip of the split counts exactly once.

    A trained model has its configuration with it; a converted one needs `preset`. `with_untuned` also scores the model
    as it was before its training. `zero_shot` asks any model by a `prompt` of model/tasks/zero_shot.py.
    Raises DataError if clips of the split are quarantined: scores on the rest would not be comparable.
    """
    if zero_shot:
        config = origin = zero_shot_config(model, shards, tracking or {})
    else:
        origin = _origin(model, shards, tracking, preset)
        config = origin.model_copy(update={"model": origin.model.model_copy(update={"init_from": model})})
    reader = open_split(storage.join(shards, split), config.data)
    missing = list(read_quarantine(storage.join(shards, split)))
    if missing:
        raise DataError(f"{shards}/{split} must be complete to be evaluated, {len(missing)} clips are quarantined.")
    untuned = _untuned(origin, reader, batch_size) if with_untuned else {}  # first: one model at a time is in memory
    task = build_zero_shot(config, prompt) if zero_shot else build_task(config)
    with tracked(config.tracking, f"evaluate-{config.name}") as run:
        predictions = _predictions(task, reader, batch_size)
        protocol = {
            "split": split,
            "clips": str(len(reader)),
            "num_frames": str(task.processor.num_frames),
            "precision": str(task.model.dtype).removeprefix("torch."),
            **task.protocol,
        }
        run.params({"model": model, "shards": shards, **protocol})
        evaluation = Evaluation(
            task=config.task,
            model=model,
            protocol=protocol,
            pretrained=bool(origin.model.init_from),
            scores=task.score(predictions, task.categories),
            untuned=untuned,
            chance=task.chance(predictions, task.categories),
            predictions=predictions,
            class_names=task.categories,
            headline=task.headline,
            captions=task.captions(predictions),
            nearest_clips=task.nearest_clips(predictions, NEAREST),
        )
        run.metrics({f"{split}/{name}": value for name, value in evaluation.scores.items()})
        _log_pictures(run, evaluation, reader, task)
    return evaluation


def _origin(model: str, shards: str, tracking: dict[str, str] | None, preset: str) -> RunConfig:
    """The configuration that the model was trained with, with the URI of the data; or that of `preset`."""
    tree = None if preset else manifest.read_manifest(model).get("config")
    if tree is None:
        if not preset:
            raise ConfigError(f"{model} was converted, not trained here: --preset must name its task's configuration.")
        tree = load_config(preset, [f"model.init_from={model}", f"data.shards={shards}"]).model_dump(mode="json")
    tree["data"] |= {"shards": shards}
    tree["tracking"] |= tracking or {"uri": ""}
    return parse_config(tree)


def _untuned(origin: RunConfig, reader: ShardReader, batch_size: int) -> dict[str, float]:
    """The scores of the model that training started from, with the same fresh weights."""
    torch.manual_seed(origin.seed)
    task = build_task(origin)
    return task.score(_predictions(task, reader, batch_size), task.categories)


@torch.inference_mode()
def _predictions(task: Evaluator, reader: ShardReader, batch_size: int) -> list[Prediction]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.model.eval().to(device)
    source = ClipSource(reader=reader, processor=task.processor, read_video=task.reads_video)
    order = EverySample(size=len(reader), batch_size=batch_size)
    loader = evaluation_batches(source, order, task.collate_evaluation)
    task.read_split(list(reader.annotations()))
    return [
        prediction
        for batch in progress(loader, total=order.steps, desc=f"evaluating {task.config.name}", unit="batch")
        for prediction in task.predict(task.normalize(on_device(batch, device)))
    ]


def _log_pictures(run: Run, evaluation: Evaluation, reader: ShardReader, task: Evaluator) -> None:
    """Logs the table of predictions, and a figure of the first clips with prediction and truth."""
    rows = [
        {key: value for key, value in row.items() if not isinstance(value, list) or key == "references"}
        for row in evaluation.predictions
    ]
    run.table(rows, "predictions")
    run.table([{"metric": key, "value": value} for key, value in evaluation.scores.items()], "metrics")
    positions = range(min(SHOWN, len(reader)))
    strips = [frame_strip(reader, position, task.processor.num_frames) for position in positions]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.png"
        save_figure(prediction_figure(strips, evaluation.captions[:SHOWN]), path)
        run.artifact(path)
