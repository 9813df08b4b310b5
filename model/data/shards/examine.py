"""Decodes the media of a row and encodes them for storage, or returns the reason why one of them is unusable.

Runs in a separate process with a deadline and a memory limit, so that a broken file can neither hang nor exhaust the
machine.
"""

import io
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from model.data.shards.format import Form, StoredClip, StoredMedium
from model.video import Pixels, VideoError, frame_indices, open_clip, open_image

JPEG_QUALITY = 88
MEMORY = 4 * 2**30
"""Bytes that a decoding process may allocate after its start."""
Media = list[tuple[str, str, bytes]]
"""Kind, path and content of each video or image of a conversation."""
NOTHING = StoredClip(files=[], frames=[], num_frames=0, fps=0.0, duration_s=0.0, width=0, height=0, bytes=0)
"""The media of a conversation that has only text."""


def limit_memory() -> None:
    """Sets the memory limit of this process; called when a decoding process starts."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def examine_clip(data: bytes, form: Form, decoder: str, deadline_s: float) -> StoredClip | tuple[str, str]:
    """The clip to store, or (reason, detail) if the frames to store (of an original clip the first, middle and last)
    cannot all be decoded."""
    return _examined(_clip, data, form, decoder, deadline_s)


def examine_conversation(media: Media, form: Form, decoder: str, deadline_s: float) -> StoredClip | tuple[str, str]:
    """The media of a conversation as one clip to store, or (reason, detail) of the first one that cannot be stored.

    `deadline_s` is that of each clip. The properties of the source are those of the first medium.
    """
    parts: list[StoredClip] = []
    for kind, path, data in media:
        part = _examined(*((_image, data, form) if kind == "image" else (_clip, data, form, decoder, deadline_s)))
        if not isinstance(part, StoredClip):
            reason, detail = part
            return reason, f"{path}: {detail}"
        parts.append(part)
    stored = [
        StoredMedium(kind=kind, files=len(part.files), frames=part.frames, num_frames=part.num_frames)
        for (kind, *_), part in zip(media, parts, strict=True)
    ]
    files, size = [data for part in parts for data in part.files], sum(part.bytes for part in parts)
    return replace(parts[0] if parts else NOTHING, files=files, frames=[], bytes=size, media=stored)


def _examined(examine: Callable[..., StoredClip], *given: Any) -> StoredClip | tuple[str, str]:
    try:
        return examine(*given)
    except VideoError as error:
        return error.reason, error.detail
    except MemoryError:
        return "too_large", f"decoding took more than {MEMORY >> 30} GiB of memory"
    except Exception as error:  # a malformed file can cause any error, which is recorded for the clip
        return "unreadable", f"{type(error).__name__}: {error}"


def _clip(data: bytes, form: Form, decoder: str, deadline_s: float) -> StoredClip:
    original = form.kind == "original"
    reader = open_clip(data, decoder, deadline_s)
    last = reader.num_frames - 1
    indices = sorted({0, last // 2, last}) if original else frame_indices(reader.num_frames, form.num_frames)
    files: list[bytes] = []
    for pixels in reader.frames([*indices, last]):
        if not original and len(files) < len(indices):
            files.append(_jpeg(pixels, form.short_side))
    return StoredClip(
        files=[data] if original else files,
        frames=[] if original else indices,
        num_frames=reader.num_frames,
        fps=round(reader.fps, 3),
        duration_s=round(reader.duration_s, 3),
        width=pixels.shape[1],
        height=pixels.shape[0],
        bytes=len(data),
    )


def _image(data: bytes, form: Form) -> StoredClip:
    pixels = open_image(data)
    original = form.kind == "original"
    return StoredClip(
        files=[data if original else _jpeg(pixels, form.short_side)],
        frames=[] if original else [0],
        num_frames=1,
        fps=0.0,
        duration_s=0.0,
        width=pixels.shape[1],
        height=pixels.shape[0],
        bytes=len(data),
    )


def _jpeg(pixels: Pixels, short_side: int) -> bytes:
    frame = Image.fromarray(pixels)
    scale = min(1.0, short_side / min(frame.size))
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    if size != frame.size:
        frame = frame.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
