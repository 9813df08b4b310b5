"""Evaluates a published model on one split: `mplug evaluate MODEL SHARDS`, on one or many processes."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from model import storage
from model.config.schema import RunConfig, TrackingConfig
from model.data.loading.loader import ClipSource, evaluation_batches, on_device, open_split
from model.data.loading.sampler import EverySample
from model.data.shards.build import read_quarantine
from model.data.shards.reader import ShardReader, read_dataset_info
from model.data.synthetic.corpus import VIDEO
from model.distributed import Processes
from model.errors import ConfigError, DataError
from model.evaluation.bootstrap import intervals
from model.evaluation.configuration import evaluation_config, trained_config
from model.evaluation.figures import frame_strip, prediction_figure, save_figure
from model.evaluation.results import EVALUATION, UNRELIABLE, Evaluation, save_evaluation
from model.progress import progress
from model.tasks import metrics
from model.tasks.base import Evaluator
from model.tasks.build import build_task, build_trained
from model.tasks.metrics import Measures, Prediction
from model.tasks.reranking import Reranking
from model.tasks.zero_shot import build_zero_shot, zero_shot_config
from model.tracking import Run, tracked

log = logging.getLogger("mplug")
WRONG_TEXTS = (
    "the released test texts of Youku-mPLUG's retrieval benchmark do not belong to their videos, as its authors say: "
    "use the split val"
)
SHOWN = 8
"""Number of clips in the figure of predictions."""
Row = tuple[Prediction, dict[str, Any]]
"""A prediction, and the frames that were read for it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate, and how."""

    model: str
    """URI of a model that was trained here, converted or published."""
    shards: str
    split: str = "val"
    overrides: Sequence[str] = ()
    """`dotted.key=value` settings, such as data.workers=4 or model.vision.num_frames=8."""
    batch_size: int = 32
    tracking: Mapping[str, str] = field(default_factory=dict)
    with_untuned: bool = False
    """Also score the model as it was before its training."""
    zero_shot: bool = False
    """Ask any model by a prompt of model/tasks/zero_shot.py."""
    prompt: str = ""
    rerank: str = ""
    """URI of a model of task matching, which orders the `top_k` results of each query anew."""
    top_k: int = 10
    out: str = ""
    """Folder or URI for scores and predictions."""


def evaluate_model(model: str, **options: Any) -> Evaluation:
    """Evaluates on this process alone; the options are those of a request."""
    (found,) = evaluate(Request(model=model, **options), Processes.alone())
    return found


def evaluate(request: Request, group: Processes) -> list[Evaluation]:
    """Scores a model on <shards>/<split>, each row exactly once. The first process returns the evaluation.

    The processes share the batches, so the results do not depend on their number. Raises DataError if clips of the
    split are quarantined: scores on the rest would not be comparable.
    """
    config, origin = _config(request), trained_config(request.model)
    if request.rerank and config.task != "retrieval":
        raise ConfigError(f"--rerank needs a retrieval model, but {request.model} is evaluated for {config.task}.")
    reader = open_split(storage.join(request.shards, request.split), config.data)
    if missing := list(read_quarantine(reader.uri)):
        raise DataError(f"{reader.uri} must be complete to be evaluated, {len(missing)} clips are quarantined.")
    if not len(reader):
        raise DataError(f"{reader.uri} must have clips to be evaluated, but it is empty.")
    # the untuned model first: one model at a time is in memory
    untuned = _untuned(request, origin, config, reader, group) if request.with_untuned else {}
    task = build_zero_shot(config, request.prompt) if request.zero_shot else build_trained(config)
    described = read_dataset_info(request.shards)
    tracking = config.tracking if group.is_main else TrackingConfig()
    description = f"{config.task} of {request.model} on {reader.uri}"
    with tracked(tracking, f"evaluate-{config.name}", description=description) as run:
        rows = _predictions(task, reader, config, request.batch_size, group)
        if request.rerank:
            task = _second_stage(request, task, rows, group)
            rows = _predictions(task, reader, config, request.batch_size, group)
        if not group.is_main:
            return []
        predictions = task.finish([prediction for prediction, _ in rows])
        measures = task.measure(predictions, task.categories)
        evaluation = Evaluation(
            task=config.task,
            model=request.model,
            shards=request.shards,
            protocol=_protocol(request, task, described, predictions),
            pretrained=bool(not request.zero_shot and origin and origin.model.init_from),
            scores=metrics.score(measures),
            intervals=intervals(measures, [row["video"] for row in predictions]),
            untuned=untuned,
            chance=task.chance(predictions, task.categories),
            class_names=task.categories,
            headline=task.headline,
            predictions=_complete(predictions, task.captions(predictions), measures, [frames for _, frames in rows]),
        )
        if request.out:
            save_evaluation(evaluation, request.out)
            run.tags({EVALUATION: request.out})
        _log(run, request, evaluation, described, reader, task)
    return [evaluation]


def _config(request: Request) -> RunConfig:
    make = zero_shot_config if request.zero_shot else evaluation_config
    return make(request.model, request.shards, request.overrides, request.tracking)


def _untuned(
    request: Request, origin: RunConfig | None, config: RunConfig, reader: ShardReader, group: Processes
) -> dict[str, float]:
    """The scores of the model that training started from, with the same fresh weights."""
    if not origin:
        raise ConfigError(f"{request.model} must have been trained here to be compared with its untuned model.")
    torch.manual_seed(origin.seed)
    task = build_task(origin.model_copy(update={"data": config.data}))
    rows = _predictions(task, reader, config, request.batch_size, group)
    return task.score(task.finish([row for row, _ in rows]), task.categories) if group.is_main else {}


def _second_stage(request: Request, first: Evaluator, rows: list[Row], group: Processes) -> Reranking:
    """The matching model, with the predictions of the retrieval model on every process."""
    overrides = [*(item for item in request.overrides if not item.startswith("model.")), "task=matching"]
    config = evaluation_config(request.rerank, request.shards, overrides, request.tracking)
    second = build_trained(config)
    found = group.from_main(lambda: [prediction for prediction, _ in rows])
    return Reranking(config, second.model, second.processor, found, request.top_k, first.protocol)


@torch.inference_mode()
def _predictions(
    task: Evaluator, reader: ShardReader, config: RunConfig, batch_size: int, group: Processes
) -> list[Row]:
    """The predictions of all processes in the order of the split, on the first process."""
    task.model.eval().to(group.device)
    task.read_split(list(reader.annotations()))
    source = ClipSource(reader=reader, processor=task.processor, read_video=task.reads_video)
    order = EverySample(size=len(reader), batch_size=batch_size, rank=group.rank, world_size=group.world_size)
    loader = evaluation_batches(
        source,
        order,
        task.collate_evaluation,
        workers=config.data.workers,
        read_ahead=config.data.read_ahead,
        with_origins=True,
    )
    own = [
        list(zip(task.predict(task.normalize(on_device(batch, group.device))), batch["frames_read"], strict=True))
        for batch in progress(
            loader, total=order.steps, desc=f"evaluating {config.name}", unit="batch", show=group.is_main
        )
    ]
    parts = group.collected(own)
    rows = list(chain.from_iterable(chain.from_iterable(zip_longest(*parts, fillvalue=[]))))
    if group.is_main and len(rows) != len(reader):
        raise DataError(f"{reader.uri} has {len(reader)} rows, but {len(rows)} were evaluated.")
    return rows


def _protocol(
    request: Request, task: Evaluator, described: Mapping[str, Any], predictions: Sequence[Prediction]
) -> dict[str, str]:
    """How the scores came about, in the order of a sentence."""
    processor = task.processor
    return {
        "data": f"{described['dataset']}@{described['sha256'][request.split][:12]}",
        "split": request.split,
        "clips": str(len({row["video"] for row in predictions})),
        "rows": str(len(predictions)),
        "frames": f"{processor.num_frames}, the middle ones of equal intervals",
        "image_size": str(processor.image_size),
        "precision": str(task.model.dtype).removeprefix("torch."),
        **task.protocol,
        **_reservations(described["dataset"], request.split, predictions[0]["video"]),
    }


def _reservations(dataset: str, split: str, video: str) -> dict[str, str]:
    is_synthetic = video == VIDEO.format(dataset=dataset, split=split, index=0)
    if (dataset, split) != ("retrieval", "test") or is_synthetic:
        return {}
    log.warning(WRONG_TEXTS)
    return {UNRELIABLE: WRONG_TEXTS}


def _complete(
    predictions: Sequence[Prediction],
    captions: Sequence[tuple[str, str]],
    measures: Measures,
    frames: Sequence[dict[str, Any]],
) -> list[Prediction]:
    """The predictions as they are stored."""
    columns = {name: values.tolist() for name, values in measures.items()}
    rows = []
    for number, (prediction, (predicted, true), read) in enumerate(zip(predictions, captions, frames, strict=True)):
        own = {name: values[number] for name, values in columns.items() if values[number] == values[number]}  # not NaN
        rows.append({**prediction, "shown": {"predicted": predicted, "true": true}, "measures": own, **read})
    return rows


def _log(
    run: Run,
    request: Request,
    evaluation: Evaluation,
    described: Mapping[str, Any],
    reader: ShardReader,
    task: Evaluator,
) -> None:
    """Logs protocol, metrics with their intervals, tables, and a figure of the first clips."""
    run.params({"model": request.model, "shards": request.shards, **evaluation.protocol})
    name, digest = f"{described['dataset']}-{request.split}", described["sha256"][request.split]
    run.dataset(name, digest, request.shards, "evaluation")
    scores = {f"{request.split}/{metric}": value for metric, value in evaluation.scores.items()}
    run.scores(scores, request.model, task.config.name, (name, digest))
    rows = [
        {key: value for key, value in row.items() if key == "references" or not isinstance(value, list | dict)}
        for row in evaluation.predictions
    ]
    run.table(rows, "predictions")
    run.table(
        [
            {
                "metric": name,
                "value": value,
                "low": evaluation.intervals[name][0],
                "high": evaluation.intervals[name][1],
            }
            for name, value in evaluation.scores.items()
        ],
        "metrics",
    )
    if evaluation.confusion:
        run.table(metrics.category_table(evaluation.predictions, evaluation.class_names), "categories")
    strips = [frame_strip(reader, row, task.processor.num_frames) for row in range(min(SHOWN, len(reader)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.png"
        save_figure(prediction_figure(strips, evaluation.captions[:SHOWN]), path)
        run.artifact(path)
