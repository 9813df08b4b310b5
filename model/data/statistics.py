"""Statistics of a sharded dataset: `mplug data stats`."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from model import storage
from model.data.annotations import SPLITS
from model.data.shards.build import read_quarantine
from model.data.shards.reader import ShardReader, read_dataset_info

COLUMNS = ["text", "label", "num_frames", "fps", "duration_s", "width", "height", "bytes"]
OTHER = "其他"
BINS = 18


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A quantity over all clips."""

    name: str
    unit: str
    edges: list[float]
    counts: list[int]
    """Clips between neighbouring edges. The last bin has no upper edge."""
    mean: float
    low: float
    """5th percentile; `median` and `high` are the 50th and 95th."""
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A dataset in numbers."""

    name: str
    """<dataset>@<digest>"""
    form: str
    clips: dict[str, int]
    """By split, like `quarantined`."""
    quarantined: dict[str, int]
    reasons: Counter[str]
    """Number of quarantined clips by reason."""
    categories: Counter[str]
    super_categories: Counter[str]
    resolutions: Counter[str]
    distributions: list[Distribution]
    hours: float
    source_bytes: int


def statistics(uri: str) -> Statistics:
    """Reads the indices and quarantine lists of all splits, but no clips."""
    facts = read_dataset_info(uri)
    categories: Counter[str] = Counter()
    resolutions: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    columns: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (*COLUMNS[2:], "characters")}
    splits = [split for split in SPLITS if split in facts["clips"]]
    for split in splits:
        reasons.update(item["reason"] for item in read_quarantine(storage.join(uri, split)))
        for batch in ShardReader(storage.join(uri, split)).batches(COLUMNS):
            labels = batch["label"].value_counts().to_pylist()
            categories.update({item["values"]: item["counts"] for item in labels if item["values"]})
            sizes, counts = np.unique(
                np.stack([batch["width"].to_numpy(), batch["height"].to_numpy()]), axis=1, return_counts=True
            )
            resolutions.update({f"{w} x {h}": int(n) for (w, h), n in zip(sizes.T.tolist(), counts, strict=True)})
            for name in COLUMNS[2:]:
                columns[name].append(batch[name].to_numpy().astype(np.float32))
            columns["characters"].append(pc.utf8_length(batch["text"]).to_numpy().astype(np.float32))
    groups: Counter[str] = Counter()
    for name, count in categories.items():
        groups[super_categories().get(name, OTHER)] += count
    whole = {name: np.concatenate(parts) if parts else np.empty(0, np.float32) for name, parts in columns.items()}
    return Statistics(
        name=uri.rstrip("/").rpartition("/")[2],
        form=facts["form"]["kind"],
        clips={split: facts["clips"][split] for split in splits},
        quarantined={split: facts["quarantined"][split] for split in splits},
        reasons=reasons,
        categories=categories,
        super_categories=groups,
        resolutions=resolutions,
        distributions=list(_distributions(whole)) if len(whole["bytes"]) else [],
        hours=float(whole["duration_s"].sum(dtype=np.float64)) / 3600,
        source_bytes=int(whole["bytes"].sum(dtype=np.float64)),
    )


def _distributions(columns: dict[str, NDArray[np.float32]]) -> "list[Distribution]":
    quantities = {
        "duration": ("s", columns["duration_s"]),
        "short side": ("pixels", np.minimum(columns["width"], columns["height"])),
        "frame rate": ("1/s", columns["fps"]),
        "size": ("MB", columns["bytes"] / np.float32(1e6)),
        "title": ("characters", columns["characters"]),
        "bit rate": ("kbit/s", columns["bytes"] / np.maximum(columns["duration_s"], 1e-3) * np.float32(8e-3)),
    }
    return [_distribution(name, unit, values) for name, (unit, values) in quantities.items()]


def _distribution(name: str, unit: str, values: NDArray[np.float32]) -> Distribution:
    low, median, high, top = (float(value) for value in np.quantile(values, (0.05, 0.5, 0.95, 0.99)))
    bottom = float(values.min())
    edges = np.linspace(bottom, max(top, bottom + 1e-3), BINS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    mean = float(values.mean(dtype=np.float64))
    return Distribution(
        name=name, unit=unit, edges=edges.tolist(), counts=counts.tolist(), mean=mean, low=low, median=median, high=high
    )


@cache
def super_categories() -> dict[str, str]:
    """Category -> super-category. The paper mentions 20 of them without a list; this grouping is the project's."""
    text = Path(__file__).with_name("super_categories.json").read_text(encoding="utf-8")
    return {name: group for group, names in json.loads(text).items() for name in names}
