"""Evaluation during training: loss and task metrics on a held-out split, computed by all processes together."""

from itertools import chain, islice, zip_longest

import torch

from model import storage
from model.config.schema import RunConfig
from model.data.loading.loader import Batches, BatchStream, ClipSource, evaluation_batches, open_split
from model.data.loading.sampler import BatchSampler, EverySample
from model.distributed import Processes, mean_over_processes
from model.errors import ConfigError
from model.tasks.base import Task
from model.tasks.metrics import lower_is_better
from model.training.engine import Engine


class Validation:
    """Scores the current network. The metrics do not depend on the number of processes."""

    def __init__(self, task: Task, config: RunConfig, group: Processes) -> None:
        self.task, self.config, self.group = task, config, group
        settings = config.evaluation
        self.reader = open_split(storage.join(settings.shards or config.data.shards, settings.split), config.data)
        self.clips = min(settings.clips or len(self.reader), len(self.reader))
        if self.clips < config.data.batch_size:
            raise ConfigError(
                f"evaluation must read at least data.batch_size = {config.data.batch_size} clips, but "
                f"{settings.split} has only {self.clips}. Lower data.batch_size, or raise evaluation.clips."
            )
        self.metric = settings.metric or "loss"
        self.lower_is_better = lower_is_better(self.metric)
        known = ("loss", *task.metrics)
        if self.metric not in known:
            raise ConfigError(f"evaluation.metric must be one of {', '.join(known)}, got {self.metric}.")
        self.source = ClipSource(reader=self.reader, processor=task.processor, read_video=task.reads_video)

    def run(self, engine: Engine) -> dict[str, float]:
        """`val/loss`, `val/<metric>`, … for the split `evaluation.split`. All processes must call it together."""
        with engine.evaluating():
            scores = self._losses(engine)
            if self.task.metrics:
                scores |= self._scores(engine)
        return {f"{self.config.evaluation.split}/{name}": value for name, value in scores.items()}

    def chosen(self, scores: dict[str, float]) -> float:
        """The value of the metric that selects the best checkpoint."""
        return scores[f"{self.config.evaluation.split}/{self.metric}"]

    def _losses(self, engine: Engine) -> dict[str, float]:
        """Losses over full batches of the training size, since contrastive losses depend on the batch size."""
        batch_size = self.config.data.batch_size // self.config.training.gradient_accumulation
        order = BatchSampler(
            size=self.clips,
            seed=0,
            batch_size=batch_size,
            steps=self.clips // batch_size,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )
        found: dict[str, list[torch.Tensor]] = {}
        stream = BatchStream(self.source, order, self.task.collate, self.config.data.read_ahead)
        for batch in Batches(stream, workers=0, max_failures=0):
            for name, value in engine.losses(batch).items():
                found.setdefault(name, []).append(value)
        return mean_over_processes({name: torch.stack(values).mean() for name, values in found.items()})

    def _scores(self, engine: Engine) -> dict[str, float]:
        """Metrics over every clip once. Under ZeRO-3 each process reads all clips, because forward passes are
        collective."""
        self.task.read_split(list(islice(self.reader.annotations(), self.clips)))
        rank, world_size = (0, 1) if engine.stage == 3 else (self.group.rank, self.group.world_size)
        size = max(1, self.config.data.batch_size // self.group.world_size)
        order = EverySample(size=self.clips, batch_size=size, rank=rank, world_size=world_size)
        own = [engine.predict(batch) for batch in evaluation_batches(self.source, order, self.task.collate_evaluation)]
        parts = [own] if engine.stage == 3 else self.group.gathered(own)
        batches = chain.from_iterable(zip_longest(*parts, fillvalue=[]))  # restores the order of the split
        predictions = self.task.finish(list(chain.from_iterable(batches)))
        return self.task.score(predictions, self.task.categories)
