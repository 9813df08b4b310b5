"""Cost of the parts of an evaluation, each against what one would take instead.

    make demo && python -m benchmarks.evaluation       # writes benchmarks/results/evaluation-<device>.json

Scoring the published 45 category names is compared with encoding the clips alone, and with reading the prompt again for
every name, at the small size of benchmarks/network.py and at that of the demo, with one token per character. Recall is
compared with sorting the whole matrix of similarities, and caption metrics with pycocoevalcap. The evaluation on two
processes reads the demo's category benchmark with a model of the small size; the start is left out, as the difference
between 480 and 48 clips. Measurements are interleaved, each in a new process.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import network
from benchmarks.interleaved import Job, compare, measured, run, write_report
from cli.services import BUCKET, object_storage
from model import manifest, storage
from model.config.load import load_config
from model.data.shards.reader import ShardReader
from model.evaluation.bootstrap import intervals
from model.mplug_video import MPlugVideoConfig, MPlugVideoForClassification
from model.tasks import metrics
from model.tasks.build import build_task

Function = tuple[Callable[[], object], int]
MODULE = "benchmarks.evaluation"
DEMO = Path("demo").resolve()
TINY_VISION = {"image_size": 64, "num_frames": 4, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY_TEXT = {**network.TEXT, "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 448}
SIZES = {"small": (network.VISION, network.TEXT, 64, 8), "tiny": (TINY_VISION, TINY_TEXT, 8, 32)}
"""Configuration of vision encoder and decoder, queries, and clips per batch."""
SMALL_VISION = [f"model.vision.{key}={value}" for key, value in network.VISION.items()]
GALLERY, WIDTH = 10_000, 256
CAPTIONS = 7_700


@torch.inference_mode()
def names(path: str, device: str, size: str) -> Function:
    """`alone`: encodes the clips; `ours`: also scores the names; `plain`: reads prefix and prompt for every name."""
    vision, text, queries, clips = SIZES[size]
    torch.manual_seed(0)
    categories = list(json.loads(network.CLASS_NAMES.read_text()))
    config = MPlugVideoConfig(
        vision_config=vision, text_config=text, num_queries=queries, class_names=categories, freeze_decoder=True
    )
    model = MPlugVideoForClassification(config).eval().requires_grad_(False).to(device)
    side, characters = vision["image_size"], {}
    pixels = torch.randn(clips, 3, vision["num_frames"], side, side, device=device)
    answers = [[characters.setdefault(one, 8 + len(characters)) for one in name] for name in categories]
    prompts = torch.randint(8, text["vocab_size"], (clips, network.PROMPT_TOKENS)).tolist()
    texts = [[[*prompt, *answer, 7] for answer in answers] for prompt in prompts]
    starts = [[network.PROMPT_TOKENS] * len(answers)] * clips

    @torch.inference_mode()
    def encode() -> object:
        prefix = model.encode_video(pixels).prefix
        if path == "alone":
            return None
        if path == "ours":
            return model.score_answers(model.read_prefixes(prefix), texts, starts).tolist()
        return [_repeated(model, prefix[row, None], own) for row, own in enumerate(texts)]

    return encode, 3


def _repeated(model: MPlugVideoForClassification, prefix: torch.Tensor, texts: list[list[int]]) -> list[float]:
    longest = max(map(len, texts))
    ids = torch.tensor([text + [7] * (longest - len(text)) for text in texts], device=prefix.device)
    position = torch.arange(1, longest, device=prefix.device)
    lengths = torch.tensor([[len(text)] for text in texts], device=prefix.device)
    mask = (position >= network.PROMPT_TOKENS) & (position < lengths)
    losses = model.token_losses(prefix.expand(len(texts), -1, -1), ids, mask.long())
    return (-losses.sum(dim=1)).tolist()


def recall(path: str, _device: str) -> Function:
    rng = np.random.default_rng(0)
    videos, texts = (
        part / np.linalg.norm(part, axis=1, keepdims=True)
        for part in rng.standard_normal((2, GALLERY, WIDTH), dtype=np.float32)
    )
    clips = list(map(str, range(GALLERY)))

    def ours() -> object:
        ways = (lambda block: texts[block] @ videos.T), (lambda block: videos[block] @ texts.T)
        rows = list(metrics.ranked([{"video": clip, "text": ""} for clip in clips], *ways))
        return metrics.score(metrics.rank_measures(rows))

    def plain() -> object:
        similarity = texts @ videos.T
        scores = {}
        for name, way in zip(metrics.WAYS, (similarity, similarity.T), strict=True):
            places = (-way).argsort(axis=1) == np.arange(GALLERY)[:, None]
            ranks = 1.0 + places.argmax(axis=1)
            scores |= metrics.score({f"{name}_rank": ranks})
        return scores

    return (ours if path == "ours" else plain), 1


def captions(path: str, _device: str) -> Function:
    rng = random.Random(0)
    words = [chr(0x4E00 + number) for number in range(300)]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(8, 30)))

    rows = []
    for number in range(CAPTIONS):
        references = [text() for _ in range(rng.randint(1, 5))]
        wrong = [rng.choice(words) if rng.random() < 0.4 else character for character in references[0]]
        rows.append({"video": str(number), "prediction": "".join(wrong), "references": references})

    def plain() -> object:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        truth = {row["video"]: [" ".join(reference) for reference in row["references"]] for row in rows}
        found = {row["video"]: [" ".join(row["prediction"])] for row in rows}
        bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
        return [*bleu, *(scorer.compute_score(truth, found)[0] for scorer in (Rouge(), Cider()))]

    return (lambda: list(metrics.score(metrics.caption_measures(rows)).values()) if path == "ours" else plain()), 1


def bootstrap(_path: str, _device: str) -> Function:
    rng = np.random.default_rng(0)
    measures = {name: rng.integers(1, 100, GALLERY).astype(float) for name in ("a_rank", "b_rank")}
    return (lambda: intervals(measures, list(map(str, range(GALLERY))))), 1


JOBS: dict[str, Job] = {
    **{f"45 names, {size}": partial(names, size=size) for size in SIZES},
    "recall of 10,000 x 10,000": recall,
    "caption metrics of 7,700 clips": captions,
    "intervals of 10,000 queries": bootstrap,
}


def products(size: str) -> float:
    """The floating-point operations of the names' matrix products, divided by those of encoding."""
    counts = {}
    for path in ("alone", "ours"):
        encode, _ = names(path, "cpu", size)
        with FlopCounterMode(display=False) as counter:
            encode()
        counts[path] = counter.get_total_flops()
    return counts["ours"] / counts["alone"] - 1


def added(size: str, rounds: int, device: str) -> dict[str, float]:
    """Time per batch of encoding alone, and what scoring adds to it; `products_adds` is the share of operations."""
    seconds: dict[str, list[float]] = {"alone": [], "ours": [], "plain": []}
    for _ in range(rounds):
        for path, found in seconds.items():
            found.append(measured(MODULE, f"45 names, {size}", path, device, {})["s"])
    medians = {path: statistics.median(found) for path, found in seconds.items()}
    shares = {path: medians[path] / medians["alone"] - 1 for path in ("ours", "plain")}
    shares["products"] = products(size)
    print(
        f"45 names, {size:6} add {shares['ours']:.0%}, their products {shares['products']:.0%}; "
        f"read with the prompt for every name {shares['plain']:.0%}"
    )
    return {"alone_s": medians["alone"], **{f"{path}_adds": share for path, share in shares.items()}}


def processes() -> dict[str, float]:
    """Clips per second of `mplug evaluate` on one process with one and two threads, and on two processes."""
    ways = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
    rates = {}
    with object_storage(DEMO), tempfile.TemporaryDirectory() as folder:
        base = f"s3://{BUCKET}/demo/models"
        config = manifest.read_manifest(manifest.latest_version(f"{base}/tiny-classification-pretrained"))["config"]
        shards = config["data"]["shards"]
        task = build_task(
            load_config(
                "tiny_classification",
                [f"data.shards={shards}", f"model.decoder={config['model']['decoder']}", *SMALL_VISION],
            )
        )
        task.save(Path(folder))
        facts = {"config": task.config.model_dump(mode="json"), "run_id": ""}
        (Path(folder) / manifest.FILE).write_bytes(manifest.describe_folder(Path(folder), **facts))
        mplug = str(Path(sys.executable).with_name("mplug"))
        command = [mplug, "evaluate", folder, shards, "data.workers=0", "--batch-size", "8", "--tracking-uri", ""]
        for way, (count, threads) in ways.items():
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            seconds = {}
            for split in ("val", "train"):
                start = time.perf_counter()
                own = [*command, "--split", split, "--processes", str(count)]
                subprocess.run(own, check=True, capture_output=True, env=environment)
                seconds[split] = time.perf_counter() - start
            clips = {split: len(ShardReader(storage.join(shards, split))) for split in seconds}
            rates[way] = (clips["train"] - clips["val"]) / (seconds["train"] - seconds["val"])
            print(f"evaluation, {way}: {rates[way]:.2f} clips/s", flush=True)
    return rates


def report(rounds: int, device: str) -> None:
    shares = {size: added(size, rounds, device) for size in SIZES}
    rows: dict[str, Any] = compare(MODULE, ["recall of 10,000 x 10,000", "caption metrics of 7,700 clips"], 1, device)
    seconds = measured(MODULE, "intervals of 10,000 queries", "ours", device, {})["s"]
    print(f"intervals of 10,000 queries: {seconds:.1f} s")
    facts = {"names": shares, "intervals_s": seconds, "clips_per_s": processes()}
    write_report("evaluation", rows, device, rounds=rounds, **facts)


if __name__ == "__main__":
    run(__doc__ or "", JOBS, report)
