import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from model.data.annotations import read_annotations
from model.data.statistics import OTHER, statistics, super_categories
from tests.helpers.paths import FIXTURES

CLASS_NAMES = json.loads((FIXTURES / "classname.json").read_text(encoding="utf-8"))


def test_every_published_category_has_one_of_twenty_super_categories() -> None:
    assert set(super_categories()) == set(CLASS_NAMES)
    assert len(set(super_categories().values())) == 20


def test_counts_match_the_annotation_files(shards: dict[str, str], corpus: Path) -> None:
    found = statistics(shards["classification"])
    rows = [row for split in ("train", "val", "test") for row in read_annotations(str(corpus), "classification", split)]
    assert list(found.clips) == ["train", "val", "test"]
    assert sum(found.clips.values()) == len(rows)
    assert found.categories == Counter(row.label for row in rows)
    assert found.super_categories == Counter(super_categories()[row.label] for row in rows)
    assert OTHER not in found.super_categories
    assert found.source_bytes == sum((corpus / row.video).stat().st_size for row in rows)


def test_distributions_match_the_clips(shards: dict[str, str], corpus: Path) -> None:
    found = {item.name: item for item in statistics(shards["retrieval"]).distributions}
    rows = [row for split in ("train", "val", "test") for row in read_annotations(str(corpus), "retrieval", split)]
    seconds = []
    for row in rows:
        with av.open(str(corpus / row.video)) as container:
            stream = container.streams.video[0]
            seconds.append(stream.frames / stream.average_rate)
    assert found["duration"].mean == pytest.approx(float(np.mean(seconds)), rel=1e-3)
    assert found["duration"].median == pytest.approx(float(np.median(seconds)), rel=1e-3)
    assert found["title"].mean == pytest.approx(np.mean([len(row.text) for row in rows]))
    assert all(sum(item.counts) == len(rows) for item in found.values())


def test_a_dataset_without_categories_has_no_category_counts(shards: dict[str, str]) -> None:
    found = statistics(shards["pretrain"])
    assert not found.categories
    assert sum(found.resolutions.values()) == sum(found.clips.values())
