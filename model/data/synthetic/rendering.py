"""Renders a synthetic scene as an H.264 clip: a subject of some colour that moves over a background.

Scenes consist of a few flat shapes that a network can distinguish at 64 pixels. Every word of the caption is visible:
colour and subject in any frame, the motion only across frames.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "红": (214, 40, 40),
    "黄": (250, 205, 30),
    "蓝": (35, 90, 220),
    "绿": (30, 150, 60),
    "紫": (140, 50, 170),
    "白": (250, 250, 250),
}
SUPERSAMPLING = 2  # sprites are drawn at twice their size, for smooth edges without an anti-aliasing rasteriser


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of a clip, in words of the caption: keys of COLOURS, SUBJECTS, BACKGROUNDS and MOTIONS."""

    subject: str
    colour: str
    background: str
    motions: tuple[str, ...]
    """One motion, or two consecutive ones of equal length."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encoding of a clip. Real corpora vary in all of these."""

    width: int
    height: int
    fps: int
    gop: int
    duration_s: float


@dataclass(frozen=True)
class Pose:
    """Pose of the subject: centre as a fraction of the frame, scale relative to its size, rotation in degrees."""

    x: float
    y: float
    scale: float = 1.0
    angle: float = 0.0


def render_clip(scene: Scene, encoding: Encoding, seed: str, path: Path) -> None:
    """Renders `scene` to `path`. The same arguments give the same bytes (one encoder thread)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(encoding.fps))
        stream.width, stream.height, stream.pix_fmt = encoding.width, encoding.height, "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "27", "g": str(encoding.gop)}
        for image in frames(scene, encoding, random.Random(seed)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())


def frames(scene: Scene, encoding: Encoding, rng: random.Random) -> Iterator[Image.Image]:
    """Yields the clip's frames as RGB images of (height, width)."""
    short_side = min(encoding.width, encoding.height)
    size = int(short_side * rng.uniform(0.52, 0.66))
    sprite = _sprite(scene.subject, COLOURS[scene.colour], size * SUPERSAMPLING)
    background = BACKGROUNDS[scene.background](encoding.width, encoding.height, rng)
    at_side = cache(lambda side: sprite.resize((side, side), Image.Resampling.BILINEAR))
    paths = [MOTIONS[motion](rng) for motion in scene.motions]
    count = max(int(encoding.duration_s * encoding.fps), len(paths))
    for index in range(count):
        progress = index / count * len(paths)
        pose = paths[int(progress)](progress % 1.0)
        yield _place(background, at_side(max(int(size * pose.scale), 4)), pose)


def _place(background: Image.Image, drawn: Image.Image, pose: Pose) -> Image.Image:
    image, side = background.copy(), drawn.width
    if pose.angle:
        drawn = drawn.rotate(-pose.angle, resample=Image.Resampling.BILINEAR)
    left = int(pose.x * image.width - side / 2)
    top = int(pose.y * image.height - side / 2)
    image.paste(drawn, (left, top), drawn)
    return image


# --- motions: progress in [0, 1) -> pose -------------------------------------------------------------------------

Track = Callable[[float], Pose]


def _slide(start: tuple[float, float], end: tuple[float, float]) -> Callable[[random.Random], Track]:
    def motion(rng: random.Random) -> Track:
        drift = rng.uniform(-0.1, 0.1)  # offset from the middle line, across the direction of travel
        dx, dy = (0.0, drift) if start[1] == end[1] else (drift, 0.0)
        return lambda p: Pose(start[0] + (end[0] - start[0]) * p + dx, start[1] + (end[1] - start[1]) * p + dy)

    return motion


def _still_at(rng: random.Random) -> tuple[float, float]:
    return rng.uniform(0.35, 0.65), rng.uniform(0.4, 0.6)


def _spin(rng: random.Random) -> Track:
    (x, y), turns, phase = _still_at(rng), rng.uniform(1.2, 2.3), rng.uniform(0, 360)
    return lambda p: Pose(x, y, angle=phase + 360 * turns * p)


def _sway(rng: random.Random) -> Track:
    (_, y), swings, phase = _still_at(rng), rng.uniform(1.6, 2.4), rng.uniform(0, 1)
    return lambda p: Pose(0.5 + 0.28 * math.sin(2 * math.pi * (swings * p + phase)), y)


def _zoom(start: float, end: float) -> Callable[[random.Random], Track]:
    def motion(rng: random.Random) -> Track:
        x, y = _still_at(rng)
        return lambda p: Pose(x, y, scale=start + (end - start) * p)

    return motion


MOTIONS: dict[str, Callable[[random.Random], Track]] = {
    "向右": _slide((0.12, 0.5), (0.88, 0.5)),
    "向左": _slide((0.88, 0.5), (0.12, 0.5)),
    "向上": _slide((0.5, 0.88), (0.5, 0.12)),
    "向下": _slide((0.5, 0.12), (0.5, 0.88)),
    "旋转": _spin,
    "摇摆": _sway,
    "靠近": _zoom(0.35, 1.7),
    "远离": _zoom(1.7, 0.35),
}

# --- backgrounds -------------------------------------------------------------------------------------------------


def _bands(upper: RGB, lower: RGB, horizon: float) -> Callable[[int, int, random.Random], Image.Image]:
    def draw(width: int, height: int, rng: random.Random) -> Image.Image:
        shade = rng.randint(-14, 14)
        image = Image.new("RGB", (width, height), _shaded(upper, shade))
        line = int(height * (horizon + rng.uniform(-0.06, 0.06)))
        ImageDraw.Draw(image).rectangle((0, line, width, height), fill=_shaded(lower, shade))
        return image

    return draw


def _night(width: int, height: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (width, height), _shaded((14, 16, 44), rng.randint(-8, 8)))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.8, 2.2)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(235, 235, 200))
    return image


def _road(width: int, height: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (width, height), _shaded((96, 98, 102), rng.randint(-10, 10)))
    draw = ImageDraw.Draw(image)
    dash, line = width // 7, int(height * rng.uniform(0.45, 0.55))
    for x in range(rng.randint(0, dash), width, dash * 2):
        draw.rectangle((x, line - height // 40, x + dash, line + height // 40), fill=(225, 225, 225))
    return image


def _stage(width: int, height: int, rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (width, height), _shaded((72, 16, 34), rng.randint(-8, 8)))
    draw = ImageDraw.Draw(image)
    middle = width * rng.uniform(0.4, 0.6)
    draw.polygon(
        [(middle, -height * 0.2), (middle - width * 0.32, height), (middle + width * 0.32, height)], fill=(150, 84, 70)
    )
    return image


BACKGROUNDS: dict[str, Callable[[int, int, random.Random], Image.Image]] = {
    "草地": _bands((150, 205, 240), (104, 190, 88), 0.28),
    "沙滩": _bands((70, 170, 200), (232, 206, 150), 0.42),
    "雪地": _bands((188, 208, 226), (232, 240, 246), 0.35),
    "夜空": _night,
    "公路": _road,
    "舞台": _stage,
}

# --- subjects: drawn into a square of the given side --------------------------------------------------------------

DARK: RGB = (30, 30, 34)
GLASS: RGB = (190, 225, 240)
PINK: RGB = (245, 140, 160)
SKIN: RGB = (228, 178, 140)
FLAME: RGB = (255, 130, 20)
WOOD: RGB = (125, 78, 42)


def _shaded(colour: RGB, by: int) -> RGB:
    r, g, b = (max(0, min(255, channel + by)) for channel in colour)
    return r, g, b


def _ball(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    box = (s * 0.04, s * 0.04, s * 0.96, s * 0.96)
    draw.ellipse(box, fill=colour, outline=DARK, width=s // 20)
    draw.pieslice(box, 0, 90, fill=DARK)  # two dark quarters make a rotation visible
    draw.pieslice(box, 180, 270, fill=DARK)


def _car(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    cabin = [(s * 0.18, s * 0.46), (s * 0.32, s * 0.18), (s * 0.68, s * 0.18), (s * 0.82, s * 0.46)]
    draw.polygon(cabin, fill=GLASS, outline=DARK)
    draw.rounded_rectangle((0, s * 0.42, s - 1, s * 0.72), s * 0.08, fill=colour, outline=DARK, width=s // 32)
    for x in (0.22, 0.78):
        draw.ellipse((s * (x - 0.17), s * 0.56, s * (x + 0.17), s * 0.90), fill=DARK)
        draw.ellipse((s * (x - 0.06), s * 0.67, s * (x + 0.06), s * 0.79), fill=(200, 200, 200))


def _cat(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    for points in ([(0.06, 0.5), (0.12, 0.0), (0.48, 0.26)], [(0.94, 0.5), (0.88, 0.0), (0.52, 0.26)]):
        draw.polygon([(x * s, y * s) for x, y in points], fill=PINK, outline=DARK)
    draw.ellipse((s * 0.04, s * 0.2, s * 0.96, s * 0.98), fill=colour, outline=DARK, width=s // 32)
    for x in (0.32, 0.68):
        draw.ellipse((s * (x - 0.09), s * 0.40, s * (x + 0.09), s * 0.60), fill=DARK)
    draw.ellipse((s * 0.32, s * 0.62, s * 0.68, s * 0.88), fill=PINK)


def _dancer(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    limb = s // 6
    draw.line((s * 0.5, s * 0.4, s * 0.06, s * 0.12), fill=SKIN, width=limb)
    draw.line((s * 0.5, s * 0.4, s * 0.96, s * 0.5), fill=SKIN, width=limb)
    draw.line((s * 0.46, s * 0.66, s * 0.26, s * 0.99), fill=SKIN, width=limb)
    draw.line((s * 0.54, s * 0.66, s * 0.76, s * 0.99), fill=SKIN, width=limb)
    draw.polygon([(s * 0.34, s * 0.3), (s * 0.66, s * 0.3), (s * 0.74, s * 0.72), (s * 0.26, s * 0.72)], fill=colour)
    draw.ellipse((s * 0.35, 0, s * 0.65, s * 0.30), fill=SKIN, outline=DARK)


def _rocket(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    draw.polygon([(s * 0.30, s * 0.72), (s * 0.70, s * 0.72), (s * 0.5, s * 0.99)], fill=FLAME)
    for points in ([(0.34, 0.44), (0.10, 0.80), (0.36, 0.74)], [(0.66, 0.44), (0.90, 0.80), (0.64, 0.74)]):
        draw.polygon([(x * s, y * s) for x, y in points], fill=FLAME)
    draw.polygon([(s * 0.5, 0), (s * 0.30, s * 0.32), (s * 0.70, s * 0.32)], fill=(120, 124, 132))
    draw.rectangle((s * 0.30, s * 0.30, s * 0.70, s * 0.76), fill=colour, outline=DARK, width=s // 32)
    draw.ellipse((s * 0.41, s * 0.38, s * 0.59, s * 0.56), fill=GLASS, outline=DARK)


def _boat(draw: ImageDraw.ImageDraw, s: int, colour: RGB) -> None:
    draw.line((s * 0.48, 0, s * 0.48, s * 0.66), fill=WOOD, width=s // 16)
    draw.polygon([(s * 0.52, s * 0.02), (s * 0.52, s * 0.58), (s * 0.98, s * 0.58)], fill=colour, outline=DARK)
    draw.polygon([(s * 0.44, s * 0.12), (s * 0.44, s * 0.58), (s * 0.08, s * 0.58)], fill=colour, outline=DARK)
    hull = [(0, s * 0.64), (s - 1, s * 0.64), (s * 0.82, s * 0.98), (s * 0.18, s * 0.98)]
    draw.polygon(hull, fill=WOOD, outline=DARK)


SUBJECTS: dict[str, Callable[[ImageDraw.ImageDraw, int, RGB], None]] = {
    "皮球": _ball,
    "汽车": _car,
    "小猫": _cat,
    "舞者": _dancer,
    "火箭": _rocket,
    "帆船": _boat,
}


def _sprite(subject: str, colour: RGB, side: int) -> Image.Image:
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    SUBJECTS[subject](ImageDraw.Draw(image), side, colour)
    return image
