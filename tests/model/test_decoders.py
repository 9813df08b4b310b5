"""Both decoders select the same frames and return the same pixels, except for known differences."""

import itertools

import numpy as np
import pytest

from model.video import DECODERS, VideoError, frame_indices, open_clip
from tests.helpers.damaging import Damaged, clip, damaged_clips, rotated

CLIPS = {item.name: item for item in damaged_clips() if item.name.startswith("right-") and "8k" not in item.name}
DECORD_FAILS = {
    "right-mpeg4-bframes.avi": "frames are numbered wrongly after a seek",
    "right-mpegts": "frames are numbered wrongly after a seek",
    "right-tiny": "frames 16 pixels wide have six channels",
    "right-narrow": "frames 16 pixels wide have six channels",
}


@pytest.mark.parametrize("name", sorted(set(CLIPS) - set(DECORD_FAILS)))
def test_both_decoders_return_the_same_pixels_per_frame_number(name: str) -> None:
    pyav, decord = (open_clip(CLIPS[name].data, decoder) for decoder in ("pyav", "decord"))
    assert pyav.num_frames == decord.num_frames
    indices = frame_indices(pyav.num_frames, 7)
    for ours, theirs in zip(pyav.frames(indices), decord.frames(indices), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(DECORD_FAILS))
def test_known_limitations_of_decord_persist(name: str) -> None:
    """If this fails, decord supports it now: remove the name here and in docs/data.md."""
    reader = open_clip(CLIPS[name].data, "decord")
    try:
        frames = [np.asarray(frame) for frame in reader.frames(frame_indices(reader.num_frames, 7))]
    except VideoError:
        return
    truth = list(open_clip(CLIPS[name].data).frames(frame_indices(reader.num_frames, 7)))
    assert not all(map(np.array_equal, frames, truth))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "options", [{}, {"bf": "3", "g": "250"}, {"g": "1"}, {"bf": "2", "x264-params": "open-gop=1:keyint=8"}], ids=str
)
def test_selected_frames_equal_those_of_full_decoding(decoder: str, options: dict[str, str]) -> None:
    data = clip(**options)
    whole = list(open_clip(data, decoder).frames(range(30)))
    assert [round(frame[-20:].mean() / 8) for frame in whole] == list(range(30))
    for indices in ([0], [29], [7, 7, 8], [0, 29, 29], list(range(3, 30, 5)), [12, 13, 14, 15]):
        chosen = list(open_clip(data, decoder).frames(indices))
        assert all(map(np.array_equal, chosen, (whole[index] for index in indices)))
        assert len(chosen) == len(indices)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("decoder", DECODERS)
def test_rotated_clips_are_upright(decoder: str, degrees: int) -> None:
    plain = next(open_clip(clip()).frames([4]))
    turned = next(open_clip(rotated(clip(), degrees), decoder).frames([4]))
    assert np.array_equal(turned, np.rot90(plain, -degrees // 90))


def test_the_deadline_is_checked_between_packets() -> None:
    data = clip(frames=3, width=3840, height=2160, preset="ultrafast")
    with pytest.raises(VideoError, match="timeout"):
        list(open_clip(data, deadline_s=0.02).frames([0, 1, 2]))


def damaged() -> list[Damaged]:
    return [item for item in damaged_clips() if item.name.startswith("flip")]


def test_a_damaged_clip_is_rejected() -> None:
    """decord returns frames whose errors FFmpeg concealed, so it is not the default."""
    wrong = dict.fromkeys(DECODERS, 0)
    for item, decoder in itertools.product(damaged(), DECODERS):
        try:
            reader = open_clip(item.data, decoder)
            frames = list(reader.frames(range(reader.num_frames)))
        except VideoError:
            continue
        wrong[decoder] += any(abs(frame[-30:].mean() - 8 * number) > 5 for number, frame in enumerate(frames))
    assert wrong["pyav"] <= 1  # of 140: a flipped bit in a table of times changes the order, which cannot be detected
    assert wrong["decord"] > 15
