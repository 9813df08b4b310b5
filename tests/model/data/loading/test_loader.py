import dataclasses
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from model.config.schema import DataConfig
from model.data.cache import Cache
from model.data.loading.loader import Batch, ClipSource, Example, evaluation_batches, training_batches
from model.data.loading.sampler import BatchSampler, EverySample
from model.data.shards.reader import ShardReader
from model.distributed import as_lost_process
from model.errors import DATA, FAILED, LOST, OUTAGE, DataError, StorageError, exit_code
from model.mplug_video.processing import MPlugVideoProcessor
from model.mplug_video.tokenization import load_tokenizer
from tests.helpers.collating import ERRORS, Chosen, FailingReader, Unloadable, collate, killed, with_a_lambda
from tests.helpers.copying import copied
from tests.helpers.paths import FIXTURES

AUGMENT = DataConfig(crop_area=0.5, flip_probability=0.5, workers=0)


def source(split: str, augment: DataConfig | None = AUGMENT, cache: Cache | None = None) -> ClipSource:
    processor = MPlugVideoProcessor(
        load_tokenizer(FIXTURES / "upstream" / "modelscope_gpt3" / "tokenizer.json"), image_size=32, num_frames=4
    )
    return ClipSource(reader=ShardReader(split, cache=cache), processor=processor, augment=augment, seed=1)


def example(clips: ClipSource, epoch: int, position: int) -> Example:
    return clips.example((epoch, position), clips.fetch(position))


def order(clips: ClipSource, **changes: int) -> BatchSampler:
    plain = BatchSampler(size=len(clips.reader), seed=1, batch_size=4, steps=12)
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def split(shards: dict[str, str]) -> str:
    return shards["pretrain"] + "/train"


def test_augmentation_depends_only_on_seed_epoch_and_clip(split: str) -> None:
    first, second = source(split), source(split)
    example(second, 0, 5)  # other clips before it
    assert torch.equal(example(first, 3, 7).clip, example(second, 3, 7).clip)
    assert not torch.equal(example(first, 3, 7).clip, example(first, 4, 7).clip)


def test_evaluation_clips_are_the_same_in_every_epoch(split: str) -> None:
    plain = source(split, augment=None)
    assert torch.equal(example(plain, 0, 2).clip, example(plain, 1, 2).clip)
    assert example(plain, 0, 2).clip.shape == (4, 32, 32, 3)


def test_one_crop_serves_all_frames_of_a_clip(split: str) -> None:
    """The background does not move: corners of consecutive frames stay nearly equal after a random crop."""
    corners = example(source(split), 0, 1).clip[:, :3, :3].float()
    assert (corners - corners[:1]).abs().mean() < 12


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_order_or_pixels(split: str, workers: int) -> None:
    clips = source(split)
    plain = list(training_batches(clips, order(clips, steps=7), collate, AUGMENT))
    parallel = list(
        training_batches(clips, order(clips, steps=7), collate, AUGMENT.model_copy(update={"workers": workers}))
    )
    assert [batch["seeds"] for batch in parallel] == [batch["seeds"] for batch in plain]
    assert all(torch.equal(one["clips"], other["clips"]) for one, other in zip(plain, parallel, strict=True))


def test_the_loader_resumes_at_any_step(split: str) -> None:
    clips = source(split)
    whole = [batch["seeds"] for batch in training_batches(clips, order(clips), collate, AUGMENT)]
    for start in (1, 5, 11):
        rest = training_batches(clips, order(clips, start_step=start), collate, AUGMENT)
        assert [batch["seeds"] for batch in rest] == whole[start:]


def test_an_evaluation_reads_each_clip_once(split: str) -> None:
    clips = source(split, augment=None)
    videos = [
        video
        for batch in evaluation_batches(clips, EverySample(size=len(clips.reader), batch_size=7), collate)
        for video in batch["videos"]
    ]
    assert videos == [annotation.video for annotation in clips.reader.annotations()]


@pytest.fixture
def damaged(split: str, tmp_path: Path) -> str:
    """A copy of a split in which the frames of two clips, but not their annotations, are overwritten."""
    copy = tmp_path / "train"
    shutil.copytree(split, copy)
    reader = ShardReader(str(copy))
    for position in (3, 11):
        record = reader.record(position)
        shard, start, length = reader._place(position)
        with (copy / f"shard-{shard:05d}.tar").open("r+b") as file:
            file.seek(start + record.start)
            file.write(b"\xff" * (length - record.start))
    return str(copy)


def test_an_unreadable_clip_is_logged_and_replaced(damaged: str, caplog: pytest.LogCaptureFixture) -> None:
    clips = source(damaged)
    size = len(clips.reader)
    batches = training_batches(
        clips, order(clips, steps=size // 4), collate, AUGMENT.model_copy(update={"max_read_failures": 0.01})
    )
    read = list(batches)
    assert batches.failed == 2
    assert {len(batch["videos"]) for batch in read} == {4}
    lost = [clips.reader.annotation(position).video for position in (3, 11)]
    assert all(any(video in line for line in caplog.messages) for video in lost)
    assert all(video not in batch["videos"] for batch in read for video in lost)


def test_too_many_unreadable_clips_end_the_run(damaged: str) -> None:
    clips = source(damaged)
    with pytest.raises(DataError, match=r"at most 0\.10% of clips may be unreadable"):
        list(training_batches(clips, order(clips, steps=len(clips.reader) // 4), collate, AUGMENT))


def test_invalid_records_count_as_unreadable_clips(damaged: str) -> None:
    reader = ShardReader(damaged)
    shard, start, _ = reader._place(5)
    with (Path(damaged) / f"shard-{shard:05d}.tar").open("r+b") as file:
        file.seek(start)
        file.write(bytes(2048))
    clips = source(damaged)
    lenient = AUGMENT.model_copy(update={"max_read_failures": 0.01})
    batches = training_batches(clips, order(clips, batch_size=1, steps=len(reader)), collate, lenient)
    assert len(list(batches)) == len(reader)
    assert batches.failed == 3


def test_loader_processes_have_their_own_process_group(split: str) -> None:
    clips = source(split)
    batches = iter(training_batches(clips, order(clips), collate, AUGMENT.model_copy(update={"workers": 1})))
    next(batches)
    children = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    readers = [child for child in children if "forkserver" in " ".join(child.cmdline())]
    assert len(readers) == 2
    groups = {os.getpgid(child.pid) for child in readers}
    assert len(groups) == 1
    assert os.getpgid(0) not in groups
    for child in readers:  # a signal to the process itself ends it
        (blocked,) = re.findall(r"SigBlk:\s+(\w+)", Path(f"/proc/{child.pid}/status").read_text())
        assert not int(blocked, 16) >> (signal.SIGTERM - 1) & 1
    assert len(list(batches)) == 11


@pytest.mark.parametrize("workers", [0, 1])
def test_a_storage_failure_is_a_one_line_error(split: str, tmp_path: Path, workers: int) -> None:
    copy = tmp_path / "train"
    shutil.copytree(split, copy)
    clips = source(str(copy))
    (copy / "shard-00000.tar").unlink()
    with pytest.raises(StorageError) as caught:
        list(training_batches(clips, order(clips), collate, AUGMENT.model_copy(update={"workers": workers})))
    assert str(caught.value) == f"{copy}/shard-00000.tar does not exist."


def test_an_evaluation_fails_at_an_unreadable_clip(damaged: str) -> None:
    with pytest.raises(DataError, match="got 1 of 4"):
        list(evaluation_batches(source(damaged, augment=None), EverySample(size=4, batch_size=4), collate))


def test_shards_on_s3_give_the_same_batches_with_and_without_a_cache(split: str, s3: str, tmp_path: Path) -> None:
    remote = copied(split, f"{s3}/loader/train")
    expected = list(islice(training_batches(source(split), order(source(split)), collate, AUGMENT), 5))
    for cache in (None, Cache(tmp_path / "cache", 10**7)):
        for _ in range(2):  # the second iteration reads from the cache
            clips = source(remote, cache=cache)
            found = list(islice(training_batches(clips, order(clips), collate, AUGMENT), 5))
            assert all(torch.equal(one["clips"], other["clips"]) for one, other in zip(expected, found, strict=True))
    assert any((tmp_path / "cache").rglob("*"))


def ended(clips: ClipSource, collate: Callable[[list[Example]], Batch]) -> Exception:
    """The error with which a loader process ends training."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which is the question
        list(training_batches(clips, order(clips), collate, AUGMENT.model_copy(update={"workers": 1})))
    return caught.value


@pytest.mark.parametrize(
    ("failure", "code"),
    [("bug", FAILED), ("runtime", FAILED), ("outage", OUTAGE), ("stubborn", OUTAGE)],
)
def test_errors_of_read_ahead_threads_keep_type_message_and_traceback(split: str, failure: str, code: int) -> None:
    reader = FailingReader(split)
    reader.failure = failure
    error = as_lost_process(ended(dataclasses.replace(source(split), reader=reader), collate))
    assert exit_code(error) == code
    assert str(ERRORS[failure]) in str(error)
    assert "in record" in "".join(traceback.format_exception(error))
    if failure != "stubborn":
        assert type(error) is type(ERRORS[failure])


def test_an_unpicklable_batch_fails_immediately(split: str) -> None:
    error = ended(source(split), with_a_lambda)
    assert "pickle" in str(error)
    assert exit_code(as_lost_process(error)) == FAILED


def test_a_loader_process_that_cannot_start_is_not_restartable(split: str) -> None:
    error = ended(source(split), Unloadable())
    assert str(error) == "a loader process has ended with exit code 1; see its output above."
    assert exit_code(as_lost_process(error)) == FAILED


def test_a_killed_loader_process_is_restartable(split: str) -> None:
    assert exit_code(as_lost_process(ended(source(split), killed))) == LOST


def test_a_loader_without_readable_clips_fails_with_the_reason(damaged: str) -> None:
    """The first batch contains exactly the damaged clips."""
    clips = dataclasses.replace(source(damaged), reader=ShardReader(damaged))
    first = Chosen(size=len(clips.reader), seed=1, batch_size=2, steps=1)
    with pytest.raises(DataError, match="no clip of the first batch can be read") as caught:
        list(training_batches(clips, first, collate, AUGMENT.model_copy(update={"workers": 1})))
    assert exit_code(as_lost_process(caught.value)) == DATA
    assert str(caught.value).count("a stored frame is not a complete JPEG") == 2
