"""Compares a training step, with and without compilation and recomputation, with a plain PyTorch loop.

On a GPU, the 1.3B preset with the released 48 clips per GPU, or as many as fit; on a CPU, a small network of the same
kind. The plain loop has weights in fp32, the frozen decoder in bf16, autocast and AdamW, and keeps all activations.
Each measurement runs in a new process (`--one WAY CLIPS` prints it), and the variants are interleaved.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.config.load import load_config
from model.config.schema import RunConfig
from model.data.loading.loader import on_device
from model.mplug_video import vision
from model.tasks.build import build_meta_task
from model.training.flops import peak_flops
from model.training.planning.estimate import Measurement, plan_run
from model.training.planning.measure import STEPS, measure_steps

PLAIN = "plain loop"
WAYS = {
    PLAIN: "[]",
    "ours": "[]",
    "ours, compiled": "[]",
    "ours, vision recomputed": "[vision]",
    "ours, vision recomputed, compiled": "[vision]",
}
"""Parts whose activations are checkpointed, per variant."""
SMALL = [
    "model.vision.image_size=112",
    "model.vision.hidden_size=384",
    "model.vision.num_hidden_layers=6",
    "model.vision.num_attention_heads=6",
    "model.text={model_type: gpt2, n_embd: 256, n_layer: 4, n_head: 4, "
    "n_positions: 256, vocab_size: 4480, bos_token_id: 0, eos_token_id: 0}",
]
ROUNDS = 3


def config_of(way: str, clips: int) -> RunConfig:
    settings = ["data.shards=none", "model.decoder=none", f"data.batch_size={clips}"]
    settings += [f"training.activation_checkpointing={WAYS[way]}", f"training.compile={'compiled' in way}"]
    on_gpu = torch.cuda.is_available()
    return load_config("pretrain_1.3b" if on_gpu else "tiny_pretraining", settings if on_gpu else [*settings, *SMALL])


def plain(config: RunConfig) -> Measurement:
    vision.recompute_intermediate = vision.keep_intermediate
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, seconds = build_meta_task(config, str(device)), []
    model = task.model.train()
    model.decoder.to(torch.bfloat16)
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = task.normalize(on_device(task.example_batch(config.data.batch_size), device))
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = task.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if device.type == "cuda":
        memory = float(torch.cuda.max_memory_reserved())
    return Measurement(memory=memory, step_s=min(seconds[1:]), clip_s=None)


def one(way: str, clips: int) -> dict[str, float]:
    config = config_of(way, clips)
    found = plain(config) if way == PLAIN else measure_steps(config)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    flops = plan_run(config, 1, on_cpu=device.type == "cpu").step_flops
    return {**asdict(found), "mfu": flops / found.step_s / peak_flops(device, torch.bfloat16)}


def _measured(way: str, clips: int) -> dict[str, float] | None:
    """None if memory is insufficient."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_step", "--one", way, str(clips)], capture_output=True, text=True
    )
    if "out of memory" in ended.stderr:
        return None
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def steps(_folder: Path) -> dict[str, Any]:
    """Measures each variant with the most clips that fit."""
    on_gpu = torch.cuda.is_available()
    clips = dict.fromkeys(WAYS, 48 if on_gpu else 8)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, rows in found.items():
            while (row := _measured(way, clips[way])) is None:
                clips[way] //= 2
            rows.append(row)
    rates = {way: clips[way] / statistics.median(row["step_s"] for row in rows) for way, rows in found.items()}
    summary = {
        way: {
            "clips": clips[way],
            "clips/s": round(rates[way], 2),
            "over the plain loop": round(rates[way] / rates[PLAIN], 3),
            "mfu": round(statistics.median(row["mfu"] for row in rows), 4),
            "memory, GB": round(max(row["memory"] for row in rows) / 1e9, 2),
        }
        for way, rows in found.items()
    }
    return {"device": torch.cuda.get_device_name() if on_gpu else "CPU, small network", **summary}


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[2], int(sys.argv[3]))))
