"""Effect of stored frames on accuracy: the demo's fine-tunings on both forms of shards."""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cli.services import BUCKET, object_storage
from model import manifest
from model.data.shards.build import ShardSettings
from model.data.shards.commit import build_shards
from model.data.shards.format import Form

DEMO = Path("demo").resolve()
SEEDS = (1, 2)
SHOWN = {"classification": ["top1"], "retrieval": ["text_to_video_r1", "video_to_text_r1"]}
MPLUG = str(Path(sys.executable).with_name("mplug"))


def metrics(folder: Path) -> dict[str, Any]:
    """Test scores after the same fine-tuning from the demo's pre-trained model; needs `make demo` first."""
    base, found = f"s3://{BUCKET}/demo", {}
    with object_storage(DEMO), ThreadPoolExecutor(2) as pool:
        for task, names in SHOWN.items():
            shards = {
                kind: build_shards(
                    ShardSettings(
                        raw=f"{base}/raw/youku-mplug",
                        root=str(folder),
                        dataset=task,
                        form=Form(kind=kind, num_frames=16, short_side=72),
                    )
                )
                for kind in ("frames", "original")
            }
            jobs = [(kind, seed) for seed in SEEDS for kind in shards]
            scores = list(pool.map(lambda job: score(base, folder, task, shards[job[0]], *job), jobs))  # noqa: B023
            found[task] = {
                name: {
                    kind: [round(row[name], 3) for (form, _), row in zip(jobs, scores, strict=True) if form == kind]
                    for kind in shards
                }
                for name in names
            }
    spread = [value for task in found.values() for row in task.values() for value in [difference(row)]]
    return {**found, "mean_difference": round(statistics.mean(spread), 3)}


def difference(row: dict[str, list[float]]) -> float:
    """Mean score on stored frames minus that on original clips."""
    return statistics.mean(row["frames"]) - statistics.mean(row["original"])


def score(base: str, folder: Path, task: str, shards: str, kind: str, seed: int) -> dict[str, float]:
    settings = [
        f"name={task}-{kind}-{seed}",
        f"seed={seed}",
        f"output={folder}",
        f"data.shards={shards}",
        f"model.init_from={manifest.latest_version(f'{base}/models/tiny-pretraining-random')}",
        f"model.decoder={manifest.latest_version(f'{base}/models/tiny-decoder-titles')}",
    ]
    trained = run("train", f"tiny_{task}", *settings).split()[-1]
    scores: dict[str, float] = json.loads(run("evaluate", trained, shards))
    return scores


def run(*arguments: str) -> str:
    return subprocess.run([MPLUG, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
