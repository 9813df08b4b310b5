"""From shards to examples: picks frames, augments, hands annotation and clip to the task's collate function."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.config import DataConfig
from model.data.annotations import Annotation
from model.data.sampler import BatchSampler, Draw
from model.data.shards import ShardReader
from model.data.transforms import training_transform
from model.data.video import frame_indices, padded
from model.mplug_video.processing import MPlugVideoProcessor

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One clip and what is said about it."""

    annotation: Annotation
    clip: Tensor | None
    """(C, T, H, W), or None where only the text is read."""
    seed: str
    """Keys all randomness of this example: the same in any worker and on any process."""


class ClipDataset(Dataset[Example]):
    """Examples of one split. Randomness is keyed by (seed, epoch, clip), so no worker and no process changes it."""

    def __init__(
        self,
        reader: ShardReader,
        processor: MPlugVideoProcessor,
        *,
        augment: DataConfig | None = None,
        seed: int = 0,
        read_video: bool = True,
    ) -> None:
        self.reader = reader
        self.processor = processor
        self.augment = augment
        self.seed = seed
        self.read_video = read_video

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, draw: Draw) -> Example:
        epoch, position = draw
        annotation, seed = self.reader.annotation(position), f"{self.seed}/{epoch}/{position}"
        if not self.read_video:
            return Example(annotation=annotation, clip=None, seed=seed)
        rng = random.Random(seed) if self.augment else None
        count = self.processor.num_frames
        indices = frame_indices(self.reader.stored_frames(position), count, rng)
        frames = self.reader.frames(position, padded(indices, count))
        if self.augment and rng:
            frames = training_transform(frames, self.processor.image_size, self.augment, rng)
            return Example(annotation=annotation, clip=self.processor.normalize(frames), seed=seed)
        return Example(annotation=annotation, clip=self.processor.clip(frames), seed=seed)


def training_loader(
    dataset: ClipDataset, sampler: BatchSampler, collate: Callable[[list[Example]], Batch], workers: int
) -> Iterable[Batch]:
    """Batches in the sampler's order."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def evaluation_loader(
    dataset: ClipDataset, collate: Callable[[list[Example]], Batch], batch_size: int
) -> Iterable[Batch]:
    """Every example once, in the split's order."""
    draws = [(0, position) for position in range(len(dataset))]
    batches = [draws[start : start + batch_size] for start in range(0, len(draws), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
