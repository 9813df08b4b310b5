"""Decodes frames of a clip with PyAV or decord. Only this file imports video decoders.

Frames are selected as in the original code: the clip is divided into equal intervals, and one frame is taken from each,
the middle one for evaluation, a random one for training. Frames are numbered in presentation order. Both decoders
return the same pixels for the same number; tests/model/test_decoders.py lists the exceptions of decord.
"""

import bisect
import io
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
"""One frame, (H, W, 3), RGB."""
DEADLINE_S = 60.0
TIMED = ("h264", "hevc", "vp8", "vp9", "av1")
"""Codecs with reliable timestamps. For others, such as MPEG-4 in AVI files, frames are counted."""
SKIPPING = ("h264", "hevc")
"""Codecs that mark non-reference frames, which can be skipped."""
MAX_PIXELS = 8192 * 4608
"""Pixels of one frame. 8K is allowed; more is a decompression bomb or a broken header."""


class VideoError(ValueError):
    """A clip cannot be decoded: a reason for statistics, and the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, " ".join(detail.split())[:200])
        self.reason, self.detail = self.args

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def open_image(data: bytes) -> Pixels:
    """An image file as one frame, turned upright as its EXIF data say. Raises VideoError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError("too_large", f"an image has at most {MAX_PIXELS} pixels, got {image.size}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError("unreadable", f"not an image that Pillow can read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Decoded frames and properties of the clip."""

    frames: list[Image.Image]
    num_frames: int
    """Frames of the source clip."""
    fps: float
    width: int
    height: int


class ClipReader(ABC):
    """An opened clip."""

    num_frames: int
    fps: float
    duration_s: float

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """Yields the frames with these ascending numbers. One at a time, since an 8K frame takes 100 MB."""


def open_clip(
    data: bytes, decoder: str = "pyav", deadline_s: float = DEADLINE_S, *, side: int | None = None
) -> ClipReader:
    """Opens an encoded clip. This and `frames` raise VideoError, also after the deadline.

    With `side` the decoder scales the frames to a square, bilinearly and without keeping the aspect ratio.
    """
    if not data:
        raise VideoError("empty", "the file has no bytes")
    return DECODERS[decoder](data, deadline_s, side)


def decode(data: bytes, num_frames: int, decoder: str = "pyav") -> DecodedClip:
    """Decodes `num_frames` uniformly spaced frames of an encoded clip, or all frames of a shorter one."""
    reader = open_clip(data, decoder)
    frames = [Image.fromarray(frame) for frame in reader.frames(frame_indices(reader.num_frames, num_frames))]
    return DecodedClip(
        frames=frames, num_frames=reader.num_frames, fps=reader.fps, width=frames[0].width, height=frames[0].height
    )


def frame_indices(length: int, num_frames: int, rng: random.Random | None = None) -> list[int]:
    """One frame index per interval: the middle, or a random one if `rng` is given.

    Without `rng`, a clip shorter than `num_frames` returns each of its frames once; see `padded`.
    """
    bounds = np.linspace(0, length, min(num_frames, length) + 1).astype(int)
    intervals = [(int(low), int(high) - 1) for low, high in pairwise(bounds)]
    if rng is None:
        return [(low + high) // 2 for low, high in intervals]
    return [rng.randint(low, high) for low, high in intervals]


def padded(indices: list[int], num_frames: int) -> list[int]:
    """Repeats the last frame of a short clip, as in the original code."""
    return indices + indices[-1:] * (num_frames - len(indices))


class PyAVReader(ClipReader):
    """Decodes as little as possible: seeks to key frames and skips non-reference frames.

    Skipping does not change the returned pixels, and saves a third of the time for clips with B-frames.
    """

    def __init__(self, data: bytes, deadline_s: float, side: int | None) -> None:
        self.data, self.deadline, self.side = data, time.monotonic() + deadline_s, side
        with _failures(data):
            self._open()
            packets = [
                (packet.dts if packet.pts is None else packet.pts, packet.is_keyframe)
                for packet in self._packets()
                if not packet.is_discard
            ]
        if not packets:
            raise VideoError("unreadable", "its video stream holds no frames")
        self.num_frames = len(packets)
        self.times = _shown_at(packets) if self.stream.codec_context.name in TIMED else None
        self.keys = sorted(shown for shown, is_key in packets if is_key and shown is not None)
        self.duration_s, self.fps = self._timing()

    def _open(self) -> None:
        self.container = av.open(io.BytesIO(self.data), metadata_errors="ignore")
        streams = [item for item in self.container.streams.video if not item.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoError("no_video_stream", f"none of its {len(self.container.streams)} streams is a video stream")
        self.stream = streams[0]
        if self.stream.codec_context is None:
            raise VideoError("unknown_codec", "FFmpeg has no decoder for its codec")
        _validate_size(self.stream.width, self.stream.height)
        # one thread: parallelism comes from processes, which would compete with decoder threads for the cores
        self.stream.codec_context.thread_count = 1

    def frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        with _failures(self.data):
            if self.times is None or not self.keys:
                yield from self._count(indices)
                return
            wanted = [self.times[index] for index in indices]
            for key, times in groupby(
                wanted, lambda shown: self.keys[max(bisect.bisect_right(self.keys, shown) - 1, 0)]
            ):
                yield from self._from_key(key, list(times))

    def _from_key(self, key: int, times: list[int]) -> Iterator[Pixels]:
        left = set(times)
        self.container.seek(key, stream=self.stream, backward=True)
        for attempt in range(2):
            for frame in self._decoded(left if self.stream.codec_context.name in SKIPPING else None):
                if frame.pts in left:
                    left.remove(frame.pts)
                    pixels = _upright(frame, self.side)
                    yield from (pixels for _ in range(times.count(frame.pts)))
                    if not left:
                        return
            if not attempt:
                self._open()  # some containers seek past the key frame: decode from the start
        raise VideoError("damaged", f"the frame at {float(min(left) * self.stream.time_base):.2f} s cannot be decoded")

    def _count(self, indices: Sequence[int]) -> Iterator[Pixels]:
        """Decodes all frames in order, for containers without timestamps."""
        self._open()
        number = -1
        for number, frame in enumerate(self._decoded(None)):
            if number in indices:
                pixels = _upright(frame, self.side)
                yield from (pixels for _ in range(list(indices).count(number)))
            if number >= indices[-1]:
                return
        raise VideoError("damaged", f"frame {indices[-1]} of {self.num_frames} cannot be decoded, {number + 1} can")

    def _decoded(self, wanted: set[int] | None) -> Iterator[av.VideoFrame]:
        context = self.stream.codec_context
        for packet in self._packets(flush=True):
            if wanted is not None:
                context.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise VideoError("damaged", f"the frame at {frame.time or 0:.2f} s is corrupt")
                yield frame

    def _packets(self, *, flush: bool = False) -> Iterator[av.Packet]:
        for packet in self.container.demux(self.stream):
            if time.monotonic() > self.deadline:
                raise VideoError("timeout", "decoding took longer than its deadline")
            if packet.size or flush:
                yield packet

    def _timing(self) -> tuple[float, float]:
        """Duration in seconds and frames per second."""
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        if self.times is None or len(self.times) < 2:
            return (self.num_frames / rate if rate else 0.0), rate
        span = float((self.times[-1] - self.times[0]) * self.stream.time_base)
        mean = (len(self.times) - 1) / span if span else rate
        return span + 1 / (mean or 1), mean


class DecordReader(ClipReader):
    """decord 0.6. Its deadline is only checked between frames; a hanging call must be killed."""

    def __init__(self, data: bytes, deadline_s: float, side: int | None) -> None:
        import decord  # not at the top: it loads a second FFmpeg

        decord.logging.set_level(decord.logging.QUIET)  # exceptions carry the same messages
        self.data, self.deadline = data, time.monotonic() + deadline_s
        with _failures(data):
            self.reader = decord.VideoReader(io.BytesIO(data), width=side or -1, height=side or -1, num_threads=1)
            self.num_frames = len(self.reader)
            self.fps = float(self.reader.get_avg_fps())
        if not self.num_frames:
            raise VideoError("unreadable", "its video stream holds no frames")
        self.duration_s = self.num_frames / self.fps if self.fps else 0.0

    def frames(self, indices: Sequence[int]) -> Iterator[Pixels]:
        with _failures(self.data):
            for index in indices:
                if time.monotonic() > self.deadline:
                    raise VideoError("timeout", "decoding took longer than its deadline")
                yield self.reader[index].asnumpy()


DECODERS: dict[str, Callable[[bytes, float, int | None], ClipReader]] = {"pyav": PyAVReader, "decord": DecordReader}


@contextmanager
def _failures(data: bytes) -> Iterator[None]:
    """Converts exceptions of the decoders into a VideoError."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # of any type: broken headers can reach any code of a decoder
        detail = f"{type(error).__name__}: {error}"
        if "st_nb" in detail:  # decord's message for a file without a video stream
            raise VideoError("no_video_stream", detail) from error
        if data[4:8] not in BOXES and not data.startswith(MAGIC):
            raise VideoError("not_a_video", f"it begins with {data[:12]!r}") from error
        raise VideoError("truncated" if _is_cut(data) else "damaged", detail) from error


def _shown_at(packets: list[tuple[int | None, bool]]) -> list[int] | None:
    """The timestamps of all frames in order; None if they are missing or not unique."""
    times = [shown for shown, _ in packets if shown is not None]
    return sorted(times) if len(set(times)) == len(packets) else None


def _upright(frame: av.VideoFrame, side: int | None) -> Pixels:
    _validate_size(frame.width, frame.height)
    scaled = {"width": side, "height": side, "interpolation": "BILINEAR"} if side else {}
    pixels = frame.to_ndarray(format="rgb24", **scaled)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _validate_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise VideoError("too_large", f"its frames have {width} x {height} pixels, at most {MAX_PIXELS} are read")


MAGIC = (b"FLV", b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"\0\0\1\xba", b"\0\0\1\xb3", b"G@", b"0&\xb2u", b"ID3")
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"pnot")


def _is_cut(data: bytes) -> bool:
    """Whether an MP4 ends before its boxes do, or before the box that locates the frames."""
    if data[4:8] not in BOXES:
        return False
    position, seen = 0, set()
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16])
        seen.add(kind)
        position = position + size if size >= 8 else len(data)
    return position > len(data) or not seen & {b"moov", b"moof"}
