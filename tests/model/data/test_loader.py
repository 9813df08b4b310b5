from pathlib import Path

import torch

from model.config import DataConfig
from model.data.loader import ClipDataset
from model.data.shards import ShardReader
from model.mplug_video.processing import MPlugVideoProcessor
from model.mplug_video.tokenization import load_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
AUGMENT = DataConfig(crop_area=0.5, flip_probability=0.5)


def dataset(shards: dict[str, str], augment: DataConfig | None = AUGMENT) -> ClipDataset:
    processor = MPlugVideoProcessor(
        load_tokenizer(FIXTURES / "upstream" / "modelscope_gpt3" / "tokenizer.json"), image_size=32, num_frames=4
    )
    return ClipDataset(ShardReader(shards["pretrain"] + "/train"), processor, augment=augment, seed=1)


def test_augmentation_is_keyed_by_epoch_and_clip_alone(shards: dict[str, str]) -> None:
    first, second = dataset(shards), dataset(shards)
    second[0, 5]  # another history
    assert torch.equal(first[3, 7].clip, second[3, 7].clip)
    assert not torch.equal(first[3, 7].clip, first[4, 7].clip)


def test_evaluation_clips_are_the_same_in_every_epoch(shards: dict[str, str]) -> None:
    plain = dataset(shards, augment=None)
    assert torch.equal(plain[0, 2].clip, plain[1, 2].clip)
    assert plain[0, 2].clip.shape == (3, 4, 32, 32)


def test_one_crop_serves_all_frames_of_a_clip(shards: dict[str, str]) -> None:
    """The background does not move: corners of consecutive frames stay nearly equal after a random crop."""
    corners = dataset(shards)[0, 1].clip[:, :, :3, :3]
    assert (corners - corners[:, :1]).abs().mean() < 0.2
