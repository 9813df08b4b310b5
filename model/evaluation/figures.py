"""Figures of clips, predictions and metrics. Chinese text needs a bundled font: Debian and matplotlib have none."""

import importlib.resources
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from model.data.shards.reader import ShardReader
from model.video import frame_indices, padded

matplotlib.use("Agg")
LONGEST_LINE = 40
"""Characters of a text in a figure."""
INK, ACCENT, MUTED = "#1f2933", "#0b7285", "#868e96"


@cache
def font() -> FontProperties:
    """Noto Sans CJK from the package noto-cjk-sans-jp-regular (the Chinese variant is not on PyPI)."""
    path = importlib.resources.files("noto_cjk_sans_jp_regular") / "NotoSansCJKjp-Regular.otf"
    return FontProperties(fname=str(path))


def frame_strip(reader: ShardReader, position: int, num_frames: int, height: int = 72) -> Image.Image:
    """The frames of one clip that a model reads, side by side."""
    record = reader.record(position)
    indices = padded(frame_indices(record.meta["num_frames"], num_frames), num_frames)
    read = reader.frames(record, indices) if record.media else []  # a conversation may have only text
    images = [Image.fromarray(frame) for frame in read] or [Image.new("RGB", (height, height), "white")]
    frames = [image.resize((round(image.width * height / image.height), height)) for image in images]
    strip = Image.new("RGB", (sum(frame.width + 2 for frame in frames) - 2, height), "white")
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width + 2
    return strip


def prediction_figure(strips: Sequence[Image.Image], texts: Sequence[tuple[str, str]]) -> Figure:
    """One row per clip: its frames, the prediction and the truth."""
    figure = Figure(figsize=(11, 1.15 * len(strips)), layout="constrained")
    rows = np.atleast_2d(figure.subplots(len(strips), 2, width_ratios=(3, 2)))
    for (left, right), strip, (predicted, true) in zip(rows, strips, texts, strict=True):
        left.imshow(np.asarray(strip))
        for axes in (left, right):
            axes.set_axis_off()
        for y, text, size, color in ((0.68, predicted, 11, ACCENT), (0.28, true, 10, MUTED)):
            right.text(0, y, _line(text), font=font(), fontsize=size, color=color, va="center", parse_math=False)
    rows[0, 1].set_title("predicted, and below it the truth", fontsize=9, color=MUTED, loc="left")
    return figure


def _line(text: str) -> str:
    """A text on one line that fits into a figure."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def confusion_figure(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Rows are true categories, columns predicted ones."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    counts = np.array(confusion)
    axes.imshow(counts, cmap="GnBu")
    axes.set_xticks(range(len(names)), names, font=font(), rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names, font=font())
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=INK)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def curve_figure(curves: Mapping[str, Sequence[tuple[int, float]]], ylabel: str) -> Figure:
    """Lines of (step, value) with a legend."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes: Axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
