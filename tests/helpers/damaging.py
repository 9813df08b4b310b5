"""300 damaged or unusual clips, each with its acceptable outcomes."""

import io
import random
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 30
"""Frame i of an undamaged clip has grey level 8 * i below a textured bar that moves with i."""


@dataclass(frozen=True)
class Damaged:
    name: str
    data: bytes
    reasons: frozenset[str]
    """Acceptable reason codes; "" if the clip must or may be decoded."""


def clip(
    frames: int = LEVELS,
    width: int = 160,
    height: int = 120,
    codec: str = "libx264",
    form: str = "mp4",
    pix_fmt: str = "yuv420p",
    times_ms: list[int] | None = None,
    movflags: str = "faststart",
    **options: str,
) -> bytes:
    texture = np.random.default_rng(0).integers(0, 255, (height // 4, width + LEVELS * 4, 3), dtype=np.uint8)
    settings = {"movflags": movflags} if form == "mp4" and movflags else {}
    with (
        tempfile.NamedTemporaryFile() as file,  # faststart reads the written file again
        av.open(file.name, "w", format=form, options=settings) as container,
    ):
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pix_fmt, options
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            pixels = np.full((height, width, 3), 8 * index, np.uint8)
            pixels[: height // 4] = texture[:, 4 * index : 4 * index + width]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times_ms[index] if times_ms else 100 * index), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(file.name).read_bytes()


def tone() -> bytes:
    """Only sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 44100, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def rotated(data: bytes, degrees: int) -> bytes:
    """Writes a rotation into the header of the track."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (value * 65536 for value in matrix)
    start = data.index(b"tkhd") + 4 + 4 + 20 + 16
    return data[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[start + 36 :]


def endless(data: bytes) -> bytes:
    """All headers contain a duration of 49 days."""
    changed = bytearray(data)
    for box, offset in ((b"mvhd", 16), (b"tkhd", 20), (b"mdhd", 16)):
        start = data.index(box) + 4 + offset
        changed[start : start + 4] = b"\xff\xff\xff\xf0"
    return bytes(changed)


def damaged_clips() -> Iterator[Damaged]:
    whole, late = clip(bf="2"), clip(movflags="")  # the second one has its index at the end
    anything = frozenset(
        ("", "damaged", "truncated", "not_a_video", "no_video_stream", "unreadable", "too_large", "unknown_codec")
    )
    for name, data in (("faststart", whole), ("late", late), ("flv", clip(form="flv")), ("mkv", clip(form="matroska"))):
        for tenth in range(10):
            cut = data[: len(data) * tenth // 10]
            sensible = frozenset({"empty"} if not cut else {"truncated"} if name == "late" else anything)
            yield Damaged(f"cut-{name}-{tenth}", cut, sensible)
    rng = random.Random(0)
    for number in range(140):
        flipped = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        yield Damaged(f"flip-{number}", bytes(flipped), anything)
    for number in range(40):
        holed, start = bytearray(whole), rng.randrange(len(whole))
        holed[start : start + 400] = bytes(len(holed[start : start + 400]))
        yield Damaged(f"hole-{number}", bytes(holed), anything)
    for number in range(30):
        yield Damaged(f"noise-{number}", rng.randbytes(rng.randint(1, 5000)), frozenset({"not_a_video"}))
    for number, text in enumerate(("hello", "<html>404 Not Found</html>", '{"Code": 404}', "标题" * 100, "\n" * 50)):
        yield Damaged(f"text-{number}", text.encode(), frozenset({"not_a_video"}))
    yield Damaged("zero", b"", frozenset({"empty"}))
    yield Damaged("sound", tone(), frozenset({"no_video_stream"}))
    yield Damaged("8k-claim", _claimed(whole, 65000, 65000), anything)
    yield from _right(whole)


def _claimed(data: bytes, width: int, height: int) -> bytes:
    """The size in the sample table differs from that in the stream."""
    start = data.index(b"avc1") + 4 + 24
    return data[:start] + struct.pack(">HH", width, height) + data[start + 4 :]


def _right(whole: bytes) -> Iterator[Damaged]:
    """Unusual, but must be decoded."""
    rng = random.Random(1)
    vfr = [sum(rng.randint(20, 300) for _ in range(index)) + 40 * index for index in range(LEVELS)]
    vfr = sorted(set(vfr))
    fine = frozenset({""})
    cases = {
        "one-frame": clip(frames=1),
        "two-frames": clip(frames=2),
        "odd-size": clip(width=161, height=121, pix_fmt="yuv444p"),
        "tiny": clip(width=16, height=16),
        "narrow": clip(width=16, height=480),
        "vfr": clip(frames=len(vfr), times_ms=vfr, bf="2"),
        "8k": clip(frames=3, width=7680, height=4320, preset="ultrafast"),
        "endless": endless(whole),
        "mpeg4.avi": clip(codec="mpeg4", form="avi"),
        "mpeg4-bframes.avi": clip(codec="mpeg4", form="avi", bf="2", g="3"),  # many key frames on every machine
        "vp9.webm": clip(codec="libvpx-vp9", form="webm"),
        "mpegts": clip(form="mpegts"),
        "flv": clip(form="flv"),
        "long-gop": clip(g="250", bf="3"),
        "intra": clip(g="1"),
        **{f"rotated-{degrees}": rotated(whole, degrees) for degrees in (90, 180, 270)},
    }
    for number in range(300 - 40 - 140 - 40 - 30 - 5 - 3 - len(cases)):
        start = rng.randint(0, 2000)
        cases[f"odd-start-{number}"] = clip(times_ms=[start + 100 * index for index in range(LEVELS)])
    for name, data in cases.items():
        yield Damaged(f"right-{name}", data, fine)
