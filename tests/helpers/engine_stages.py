"""One of two processes: `torchrun engine_stages.py DECODER OUT` trains a few steps in every ZeRO stage."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from model.config.load import load_config
from model.config.schema import WatchdogConfig
from model.distributed import Processes, processes
from model.tasks.build import build_task
from model.training.clock import Clock
from model.training.engine import Engine
from model.training.zero import missing_attributes

CLIPS, STEPS = 8, 3


def batch(step: int, group: Processes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 400, (CLIPS, 12), generator=generator)
    pixels = torch.randn(CLIPS, 3, 4, 64, 64, generator=generator)
    own = slice(group.rank, None, group.world_size)
    return {"pixel_values": pixels[own], "input_ids": ids[own], "attention_mask": torch.ones_like(ids)[own]}


def engine_of(decoder: str, stage: int, precision: str, group: Processes) -> Engine:
    settings = [f"model.decoder={decoder}", "data.shards=unused", f"data.batch_size={CLIPS}", "optim.warmup_steps=0"]
    settings += [f"training.zero_stage={stage}", f"training.precision={precision}", "training.steps=9"]
    settings += ["training.activation_checkpointing=[vision, abstractor, decoder]"] if stage == 2 else []
    config = load_config("tiny_pretraining", settings)
    torch.manual_seed(0)
    task = build_task(config)
    task.model.train()
    return Engine(task.network, config, group)


def train(engine: Engine, steps: range, group: Processes) -> list[float]:
    clock = Clock(group.device)
    return [float(engine.step([batch(step, group)], 1e-3, clock).losses["loss"]) for step in steps]


def facts(decoder: str, precision: str, group: Processes) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "then": {}, "restored": {}, "from_stage_2": {}, "missing": {}}
    saved: dict[int, tuple[list[dict[str, torch.Tensor]], int]] = {}
    for stage in range(4):
        engine = engine_of(decoder, stage, precision, group)
        trained = [parameter for parameter in engine.engine.module.parameters() if parameter.requires_grad]
        found["missing"][stage] = [
            name for parameter in trained for name in missing_attributes(engine.optimizer, stage, parameter)
        ]
        found["losses"][stage] = train(engine, range(STEPS), group)
        copies = {name: tensor.clone() for name, tensor in engine.state.tensors().items()}
        saved[stage] = group.gathered(copies), engine.state.updates
        found["then"][stage] = train(engine, range(STEPS, STEPS + 2), group)
    for stage in range(4):
        engine = engine_of(decoder, stage, precision, group)
        for name, source in (("restored", stage), ("from_stage_2", 2)):
            parts, updates = saved[source]
            copied = sum(map(engine.state.load, parts))
            assert stage == 0 or copied == engine.state.numel
            engine.restored(updates)
            found[name][stage] = train(engine, range(STEPS, STEPS + 2), group)
        found.setdefault("skipped", {})[stage] = skips(engine, group)
    return found


def skips(engine: Engine, group: Processes) -> bool:
    """Whether both processes skip a step if one of them has a broken clip."""
    before = {name: tensor.clone() for name, tensor in engine.state.tensors().items()}
    broken = batch(9, group)
    if group.is_main:
        broken["pixel_values"][0] = float("nan")
    result = engine.step([broken], 1e-3, Clock(group.device))
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in engine.state.tensors().items())
    return unchanged and not result.applied and engine.step([batch(9, group)], 1e-3, Clock(group.device)).applied


def main(decoder: str, out: Path) -> None:
    with processes(WatchdogConfig()) as group:
        found = {precision: facts(decoder, precision, group) for precision in ("fp32", "bf16")}
        if group.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
