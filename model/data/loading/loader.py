"""From shards to batches: selects frames, augments them, and passes annotation and clip to the task's collate function.

Every loader process computes which clips its batches need and reads them ahead. All randomness of a clip is keyed by
(seed, epoch, position), so the numbers of processes and workers do not matter.
"""

import hashlib
import logging
import pickle
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.config.schema import DataConfig
from model.data.annotations import Annotation
from model.data.cache import open_cache
from model.data.loading.sampler import BatchSampler, Draw, EverySample
from model.data.loading.transforms import training_transform
from model.data.prefetch import in_order
from model.data.shards.format import Record, StoredMedium
from model.data.shards.reader import ShardReader
from model.errors import ConfigError, DataError, ProcessFailedError, RemoteError
from model.manifest import cache_folder
from model.video import VideoError, frame_indices, padded

if TYPE_CHECKING:
    from model.mplug_owl_video.processing import MplugOwlProcessor
    from model.mplug_video.processing import MPlugVideoProcessor

log = logging.getLogger("mplug")
Batch = dict[str, Any]
FIRST_CLIPS = 1000
"""The share of unreadable clips is computed over at least this many, so that one early failure does not end a run."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row: an annotation and its clip, or the videos and images of its conversation."""

    annotation: Annotation
    media: list[Tensor]
    """Frames of the model's size, uint8 (T, H, W, C) each; an image has one. Empty for tasks that only read text."""
    seed: str
    """Keys all randomness of this example, independent of worker and process."""
    frames: list[list[int]] = field(default_factory=list)
    """For each medium, the numbers of its frames in the source."""

    @property
    def clip(self) -> Tensor:
        """The only medium of tasks that read one clip per row."""
        (clip,) = self.media
        return clip


Fetched = Record | Annotation | VideoError


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Makes the examples of one split."""

    reader: ShardReader
    processor: "MPlugVideoProcessor | MplugOwlProcessor"
    augment: DataConfig | None = None
    seed: int = 0
    read_video: bool = True

    def fetch(self, position: int) -> Fetched:
        """Reads a clip from storage; called ahead of time by several threads. Errors of the clip are returned."""
        try:
            return self.reader.record(position) if self.read_video else self.reader.annotation(position)
        except (ValueError, KeyError) as error:
            return VideoError("damaged", f"clip {position} is not a valid record: {error}")

    def example(self, draw: Draw, fetched: Fetched) -> Example:
        """Raises VideoError if the clip cannot be read or decoded."""
        if isinstance(fetched, VideoError):
            raise fetched
        seed = f"{self.seed}/{draw[0]}/{draw[1]}"
        if isinstance(fetched, Annotation):
            return Example(annotation=fetched, media=[], seed=seed)
        rng = random.Random(seed) if self.augment else None
        indices = [self._indices(medium, rng) for medium in fetched.media]
        media = [self._frames(fetched, number, wanted, rng) for number, wanted in enumerate(indices)]
        numbers = map(self.reader.frame_numbers, fetched.media, indices)
        return Example(annotation=fetched.annotation, media=media, seed=seed, frames=list(numbers))

    def _indices(self, medium: StoredMedium, rng: random.Random | None) -> list[int]:
        if medium.kind == "image":
            return [0]
        count = self.processor.num_frames
        return padded(frame_indices(medium.num_frames, count, rng), count)

    def _frames(self, record: Record, number: int, indices: list[int], rng: random.Random | None) -> Tensor:
        """Frames (T, H, W, C) of a medium; one of an image."""
        frames = torch.from_numpy(np.stack(self.reader.frames(record, indices, number)))
        if self.augment and rng:
            return training_transform(frames, self.processor.image_size, self.augment, rng)
        if record.media[number].kind == "image":  # only conversations have images
            return self.processor.crop(frames)  # type: ignore[union-attr]
        return self.processor.resize(frames)


Order = BatchSampler | EverySample
Collate = Callable[[list[Example]], Batch]
Loaded = tuple[Batch, int, list[str]] | RemoteError
"""A batch, its number of clips, and messages about unreadable clips; or an error that ends the run. It is a value,
because DataLoader loses type and message of an exception raised in a loader process."""
SHARED_MEMORY = Path("/dev/shm")


class BatchStream(IterableDataset[Loaded]):
    """Collated batches in the given order. With n workers, each makes every n-th batch.

    `with_origins` adds the origin of each row: its position in the split, and which frames it consists of.
    """

    def __init__(
        self, source: ClipSource, order: Order, collate: Collate, read_ahead: int, *, with_origins: bool = False
    ) -> None:
        self.source, self.order, self.collate, self.read_ahead = source, order, collate, read_ahead
        self.with_origins = with_origins
        self.last: list[Example] = []
        """The last readable clip, or none yet: it replaces all clips of a batch without one."""

    def __iter__(self) -> Iterator[Loaded]:
        if get_worker_info() is None:
            yield from self._batches()
            return
        try:
            for batch, clips, failures in self._batches():
                yield _shared(batch), clips, failures
        except Exception as error:  # of any kind: it is raised again in the training process
            yield RemoteError.of(error)

    def _batches(self) -> Iterator[tuple[Batch, int, list[str]]]:
        worker = get_worker_info()
        if worker:
            torch.set_num_threads(1)  # parallelism comes from the workers
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        steps = range(self.order.start_step + first, self.order.steps, every)
        batches = (self.order.batch(step) for step in steps)
        with ThreadPoolExecutor(self.read_ahead, thread_name_prefix="read-ahead") as pool:
            sizes: list[int] = []

            def begin() -> Iterator["Future[tuple[Draw, Fetched]]"]:
                for batch in batches:
                    sizes.append(len(batch))
                    yield from (pool.submit(self._fetch, draw) for draw in batch)

            fetched = in_order(begin(), self.read_ahead)
            for future in fetched:
                whole = chain([future], islice(fetched, sizes.pop(0) - 1))
                # one by one: later clips are fetched while a clip is decoded
                yield self._batch(item.result() for item in whole)

    def _fetch(self, draw: Draw) -> tuple[Draw, Fetched]:
        return draw, self.source.fetch(draw[1])

    def _batch(self, fetched: Iterable[tuple[Draw, Fetched]]) -> tuple[Batch, int, list[str]]:
        examples: list[Example | None] = []
        failures, positions = [], []
        for draw, item in fetched:
            positions.append(draw[1])
            try:
                examples.append(self.source.example(draw, item))
            except VideoError as error:
                examples.append(None)
                key = item.meta["video"] if isinstance(item, Record) else str(draw)
                failures.append(f"{self.source.reader.uri} {key}: {error}")
        read = [example for example in examples if example is not None] or self.last
        if not read:
            raise DataError("no clip of the first batch can be read:\n" + "\n".join(failures))
        self.last = read[-1:]
        # processes exchange features of equal shape, so every batch must be full
        following = cycle(read[1:] + read[:1])
        batch = self.collate([example or next(following) for example in examples])
        if self.with_origins:  # of readable clips: an evaluation ends at the first other one
            batch["positions"] = positions
            batch["frames_read"] = [_frames_read(example) for example in examples if example]
        return batch, len(examples), failures


def _frames_read(example: Example) -> dict[str, Any]:
    """The numbers of the frames of each medium, and a hash of the pixels that the model sees."""
    digest = hashlib.sha256()
    for medium in example.media:
        digest.update(medium.numpy().tobytes())
    return {"frames": example.frames, "frames_sha256": digest.hexdigest()}


def _shared(batch: Batch) -> Batch:
    """Moves a batch to shared memory. DataLoader would do this in a thread that does not report errors."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    pickle.dumps([value for value in batch.values() if not isinstance(value, Tensor)])
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        disk = disk_usage(SHARED_MEMORY)
        raise ConfigError(
            f"{SHARED_MEMORY} must hold a batch of {sum(tensor.nbytes for tensor in tensors) / 1e6:.0f} MB, "
            f"{disk.free / 1e6:.0f} of its {disk.total / 1e6:.0f} MB are free. `mplug plan` says what a run needs; "
            "enlarge it, or lower data.workers or data.batch_size."
        ) from error
    return batch


class Batches:
    """Batches of a run. Unreadable clips are logged and counted; too many of them end the run."""

    def __init__(self, stream: BatchStream, *, workers: int, max_failures: float) -> None:
        self.max_failures = max_failures
        self.read, self.failed, self.reported = 0, 0, 0
        if workers:
            start_fork_server(stream.collate.__module__)
        self.loader: DataLoader[Loaded] = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            # forking a process with threads (DeepSpeed, S3) can deadlock, and spawning imports torch each time
            multiprocessing_context="forkserver" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def take_failures(self) -> int:
        """Number of unreadable clips since the last call."""
        failures, self.reported = self.failed - self.reported, self.failed
        return failures

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self._loaded():
            if isinstance(loaded, RemoteError):
                loaded.reraise()
            batch, clips, failures = loaded
            self.read += clips
            self.failed += len(failures)
            for failure in failures:
                log.warning("unreadable clip, replaced by another of the batch: %s", failure)
            if self.failed > self.max_failures * max(self.read, FIRST_CLIPS):
                raise DataError(
                    f"at most {self.max_failures:.2%} of clips may be unreadable (data.max_read_failures), got "
                    f"{self.failed} of {self.read}; the last is {failures[-1]}."
                )
            yield batch

    def _loaded(self) -> Iterator[Loaded]:
        """Raises ProcessFailedError if a loader process fails before it can send its error."""
        iterator = iter(self.loader)
        try:
            yield from iterator
        except RuntimeError as error:
            codes = [process.exitcode for process in getattr(iterator, "_workers", []) if process.exitcode]
            if not any(code > 0 for code in codes):
                raise
            raise ProcessFailedError(
                f"a loader process has ended with exit code {max(codes)}; see its output above."
            ) from error


def start_fork_server(*modules: str) -> None:
    """Starts the process that loader processes are forked from. Starting it early hides its imports.

    SIGTERM is blocked until it has left the process group (model.data.loading.leave_process_group).
    """
    get_context("forkserver").set_forkserver_preload(["model.data.loading.leave_process_group", __name__, *modules])
    resource_tracker.ensure_running()  # started by the fork server, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; annotations stay. From pinned memory, copies do not block."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def open_split(uri: str, config: DataConfig) -> ShardReader:
    """Opens a split with the settings of a run."""
    cache = open_cache(cache_folder() / "clips", int(config.cache_gb * 1e9)) if config.cache_gb else None
    return ShardReader(uri, cache=cache, decoder=config.decoder, deadline_s=config.decode_deadline_s)


def training_batches(source: ClipSource, order: BatchSampler, collate: Collate, config: DataConfig) -> Batches:
    """Batches in the sampler's order."""
    stream = BatchStream(source, order, collate, config.read_ahead)
    return Batches(stream, workers=config.workers, max_failures=config.max_read_failures)


def evaluation_batches(
    source: ClipSource,
    order: EverySample,
    collate: Collate,
    *,
    workers: int = 0,
    read_ahead: int = 32,
    with_origins: bool = False,
) -> Batches:
    """Every example once, in the order of the split. An unreadable clip ends the evaluation."""
    stream = BatchStream(source, order, collate, read_ahead, with_origins=with_origins)
    return Batches(stream, workers=workers, max_failures=0)
