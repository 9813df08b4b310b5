"""Decodes one clip and encodes it for storage, or returns the reason why it is unusable.

Runs in a separate process with a deadline and a memory limit, so that a broken file can neither hang nor exhaust the
machine.
"""

import io
import resource

from PIL import Image

from model.data.shards.format import Form, StoredClip
from model.video import Pixels, VideoError, frame_indices, open_clip

JPEG_QUALITY = 88
MEMORY = 4 * 2**30
"""Bytes that a decoding process may allocate after its start."""


def limit_memory() -> None:
    """Sets the memory limit of this process; called when a decoding process starts."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def examine_clip(data: bytes, form: Form, decoder: str, deadline_s: float) -> StoredClip | tuple[str, str]:
    """The clip to store, or (reason, detail) if the frames to store (of an original clip the first, middle and last)
    cannot all be decoded."""
    original = form.kind == "original"
    try:
        reader = open_clip(data, decoder, deadline_s)
        last = reader.num_frames - 1
        indices = sorted({0, last // 2, last}) if original else frame_indices(reader.num_frames, form.num_frames)
        files: list[bytes] = []
        for pixels in reader.frames([*indices, last]):
            if not original and len(files) < len(indices):
                files.append(_jpeg(pixels, form.short_side))
    except VideoError as error:
        return error.reason, error.detail
    except MemoryError:
        return "too_large", f"decoding took more than {MEMORY >> 30} GiB of memory"
    except Exception as error:  # a malformed file can cause any error, which is recorded for the clip
        return "unreadable", f"{type(error).__name__}: {error}"
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


def _jpeg(pixels: Pixels, short_side: int) -> bytes:
    frame = Image.fromarray(pixels)
    scale = min(1.0, short_side / min(frame.size))
    size = (max(1, round(frame.width * scale)), max(1, round(frame.height * scale)))
    if size != frame.size:
        frame = frame.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
