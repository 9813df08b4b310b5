"""From shards to examples: picks frames, augments, hands annotation and clip to the task's collate function."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.config import DataConfig
from model.data.annotations import Annotation
from model.data.sampler import BatchSampler, Draw
from model.data.shards import ShardReader
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
            frames = random_crop(frames, self.processor.image_size, self.augment, rng)
            return Example(annotation=annotation, clip=self.processor.normalize(frames), seed=seed)
        return Example(annotation=annotation, clip=self.processor.clip(frames), seed=seed)


def random_crop(frames: Sequence[Image.Image], size: int, augment: DataConfig, rng: random.Random) -> list[Image.Image]:
    """One random crop for all frames (area from `crop_area` up, aspect 3/4 to 4/3), and perhaps a mirror image."""
    width, height = frames[0].size
    area = width * height * rng.uniform(augment.crop_area, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))) * width / height
    crop_width = min(width, math.sqrt(area * aspect))
    crop_height = min(height, area / crop_width)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    cropped = [frame.resize((size, size), Image.Resampling.BICUBIC, box=box) for frame in frames]
    if rng.random() < augment.flip_probability:
        return [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in cropped]
    return cropped


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
