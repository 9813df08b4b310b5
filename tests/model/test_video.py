import io
import json
import random

import av
import numpy as np
import pytest

from model.video import VideoError, decode, frame_indices, padded
from tests.helpers.paths import FIXTURES

GOLDEN = json.loads((FIXTURES / "frame_indices.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['length']}-{case['num_frames']}")
def test_middle_frames_match_upstream(case: dict) -> None:
    assert padded(frame_indices(case["length"], case["num_frames"]), case["num_frames"]) == case["middle"]


def test_random_frames_cover_every_interval_and_every_frame() -> None:
    rng = random.Random(0)
    drawn = [frame_indices(10, 3, rng) for _ in range(300)]
    assert all(0 <= a <= 2 and 3 <= b <= 5 and 6 <= c <= 9 for a, b, c in drawn)
    assert {index for indices in drawn for index in indices} == set(range(10))


def counting_clip(length: int) -> bytes:
    """A clip whose frame i has grey level 8 * i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"g": "5", "crf": "1"}
        for index in range(length):
            image = np.full((48, 64, 3), 8 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_the_selected_frames_are_decoded() -> None:
    clip = decode(counting_clip(24), 4)
    assert clip.num_frames == 24
    assert (clip.width, clip.height, clip.fps) == (64, 48, 10.0)
    levels = [np.asarray(frame).mean() / 8 for frame in clip.frames]
    assert [round(level) for level in levels] == frame_indices(24, 4)


def test_a_short_clip_returns_each_frame_once() -> None:
    assert len(decode(counting_clip(2), 16).frames) == 2


@pytest.mark.parametrize("data", [b"", b"text named mp4", counting_clip(24)[:400]], ids=["empty", "text", "cut"])
def test_a_file_without_video_is_a_one_line_error(data: bytes) -> None:
    with pytest.raises(VideoError) as caught:
        decode(data, 4)
    assert "\n" not in str(caught.value)
    assert caught.value.reason == {0: "empty", 14: "not_a_video", 400: "truncated"}[len(data)]
