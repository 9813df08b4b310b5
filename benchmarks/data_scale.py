"""Ten million rows and thousands of objects: the scale measurements of benchmarks/data.py."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cli.services import BUCKET, local_services, object_storage
from model.data.shards.build import PART_CLIPS, ShardPlan, ShardSettings, Split, part_uri
from model.data.shards.format import INDEX, QUARANTINE, SCHEMA

ROWS = 10_000_000
MEMORY = """
def mib():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {key: int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM")}
"""
JOIN = (
    MEMORY
    + """
import json, sys, time
from pathlib import Path
from model.data.shards.build import ShardPlan, ShardSettings, Split
from model.data.shards.commit import join_parts
staging, rows, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
split = Split(name="train", rows=rows, duplicates={})
plan = ShardPlan(settings=ShardSettings(raw="", root="", dataset="pretrain"), splits=[split], staging=staging)
before, start = mib()["VmRSS"], time.perf_counter()
joined = join_parts(plan, split, out)
print(json.dumps({"rows": joined.clips, "seconds": time.perf_counter() - start, "peak_mib": mib()["VmHWM"],
                  "mib_before": before}))
"""
)
OPEN = (
    MEMORY
    + """
import json, sys, time
from model.data.loading.sampler import BatchSampler
from model.data.shards.reader import ShardReader
before, start = mib()["VmRSS"], time.perf_counter()
reader = ShardReader(sys.argv[1])
opened = time.perf_counter() - start
order = BatchSampler(size=len(reader), seed=0, batch_size=48, steps=10**9)
start = time.perf_counter()
for step in range(2000):
    for _, position in order.batch(step):
        reader._place(position)
per_sample = (time.perf_counter() - start) / (2000 * 48)
print(json.dumps({"rows": len(reader), "seconds": opened, "mib": mib()["VmRSS"], "peak_mib": mib()["VmHWM"],
                  "mib_before": before, "us_per_sample": per_sample * 1e6}))
"""
)


def index(folder: Path) -> dict[str, Any]:
    """Writes parts like the sharder, then joins and opens them in separate processes."""
    found: dict[str, Any] = {}
    for rows in (ROWS // 10, ROWS):
        staging, out = folder / f"staging-{rows}", folder / f"index-{rows}"
        write_parts(staging, rows)
        joined = child(JOIN, str(staging), str(rows), str(out))
        opened = [child(OPEN, str(out)) for _ in range(3)]
        found[f"{rows:,} rows"] = {
            "index_bytes": (out / INDEX).stat().st_size,
            "joined": joined,
            "opened": sorted(opened, key=lambda run: run["seconds"])[1],
        }
    return found


def write_parts(staging: Path, rows: int) -> None:
    size = PART_CLIPS["frames"]
    split = Split(name="train", rows=rows, duplicates={})
    plan = ShardPlan(settings=ShardSettings(raw="", root="", dataset="pretrain"), splits=[split], staging=str(staging))
    rng = np.random.default_rng(0)
    for number in range(plan.count(split)):
        count = min(size, rows - number * size)
        lengths = rng.integers(200, 600, count) * 512
        columns = {
            "key": [f"{number * size + row:08d}" for row in range(count)],
            "video": [f"videos/pretrain/14111B12{value:040x}.mp4" for value in rng.integers(0, 2**62, count).tolist()],
            "text": [f"标题{value}，看看是怎么做的，太精彩了" for value in rng.integers(0, 10**9, count).tolist()],
            "label": [""] * count,
            "references": [[]] * count,
            "shard": np.zeros(count, np.int32),
            "offset": np.cumsum(lengths) - lengths,
            "length": lengths,
            "sha256": [rng.bytes(32) for _ in range(count)],
            **{name: rng.integers(1, 2000, count) for name in ("num_frames", "width", "height", "bytes")},
            **{name: rng.random(count) for name in ("fps", "duration_s")},
        }
        table = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names})
        uri = Path(part_uri(plan, split, number))
        uri.mkdir(parents=True)
        (uri / QUARANTINE).write_text("")
        pq.write_table(table.replace_schema_metadata({"inputs": "", "shards": "1"}), uri / INDEX, compression="zstd")


def child(code: str, *arguments: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ran.stdout)
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}


# --- download ---------------------------------------------------------------------------------------------------------

SETS = {"5,000 of 50 kB": (5000, 50_000), "20 of 50 MB": (20, 50_000_000)}
ROUNDS = 3


@contextmanager
def two_servers(folder: Path) -> Iterator[dict[str, str]]:
    """Runs servers a and b with an AWS profile each; returns their endpoints."""
    lines, endpoints = [], {}
    before = dict(os.environ)
    with object_storage(folder / "a"), object_storage(folder / "b"):
        for name in ("a", "b"):
            environment = local_services(folder / name).environment()
            endpoints[name] = environment["AWS_ENDPOINT_URL_S3"]
            lines += [
                f"[profile {name}]",
                "region = us-east-1",
                f"endpoint_url = {endpoints[name]}",
                f"aws_access_key_id = {environment['AWS_ACCESS_KEY_ID']}",
                f"aws_secret_access_key = {environment['AWS_SECRET_ACCESS_KEY']}",
            ]
        (folder / "config").write_text("\n".join(lines) + "\n")
        (folder / "credentials").write_text("\n".join(lines).replace("[profile ", "[") + "\n")
        os.environ["AWS_CONFIG_FILE"] = str(folder / "config")
        yield endpoints
    os.environ.clear()
    os.environ.update(before)


def download(folder: Path) -> dict[str, Any]:
    """Copies from server a to server b: here in one command, with s5cmd through the disk."""
    found: dict[str, Any] = {}
    with two_servers(folder) as endpoints:
        for name, (count, size) in SETS.items():
            source = folder / "source" / str(size)
            (source / "pretrain").mkdir(parents=True)
            (source / "pretrain" / "train.csv").write_text("video_id:FILE,title\n")
            for number in range(count):
                (source / f"{number:05d}.bin").write_bytes(os.urandom(size))
            s5cmd(endpoints["a"], "a", folder, f"{source}/", f"s3://{BUCKET}/source-{size}/")
            taken: dict[str, list[float]] = {"ours": [], "s5cmd": []}
            for turn in range(ROUNDS + 1):
                start = time.perf_counter()
                mplug(f"s3://a@{BUCKET}/source-{size}", f"s3://b@{BUCKET}/ours-{size}-{turn}")
                middle = time.perf_counter()
                local = folder / f"by-s5cmd-{size}-{turn}"
                s5cmd(endpoints["a"], "a", folder, f"s3://{BUCKET}/source-{size}/*", f"{local}/")
                s5cmd(endpoints["b"], "b", folder, f"{local}/", f"s3://{BUCKET}/s5cmd-{size}-{turn}/")
                if turn:  # the first one is a warm-up
                    taken["ours"].append(middle - start)
                    taken["s5cmd"].append(time.perf_counter() - middle)
            found[name] = {
                "seconds": {who: round(statistics.median(seconds), 2) for who, seconds in taken.items()},
                "over_s5cmd": round(
                    statistics.median(b / a for a, b in zip(taken["ours"], taken["s5cmd"], strict=True)), 3
                ),
            }
    return found


def mplug(source: str, root: str) -> None:
    command = [str(Path(sys.executable).with_name("mplug")), "data", "download", source, root]
    subprocess.run(command, check=True, capture_output=True)


def s5cmd(endpoint: str, profile: str, folder: Path, source: str, dest: str) -> None:
    command = [
        str(Path(sys.executable).with_name("s5cmd")),
        "--endpoint-url",
        endpoint,
        "--profile",
        profile,
        "--credentials-file",
        str(folder / "credentials"),
        "cp",
        source,
        dest,
    ]
    subprocess.run(command, check=True, capture_output=True)
