"""LoRA: losses and gradients of the original code, and both exports."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from model.mplug_owl_video import MplugOwlForConditionalGeneration
from model.mplug_owl_video.lora import add_lora, merged_weights, save_adapter
from tests.helpers.owl import OwlRecording
from tests.model.mplug_owl_video.test_parity import assert_near

STEP = OwlRecording("train_step")
WEIGHTS = {"bloom": OwlRecording("bloom_forward"), "llama": OwlRecording("llama_generate")}
RUNS = {"bloom": ("lora_bloom_video_repaired", "video"), "llama": ("lora_llama_image_verbatim", "image")}
PREFIX = "base_model.model."


def tuned(decoder: str) -> MplugOwlForConditionalGeneration:
    """The recorded model with the recorded updates, which are not zero."""
    model = WEIGHTS[decoder].model().requires_grad_(False)
    settings = STEP.facts["lora"]
    add_lora(model.language_model, rank=settings["r"], alpha=settings["lora_alpha"], dropout=settings["lora_dropout"])
    updates = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    with torch.no_grad():
        for name, weights in updates.items():
            weights.copy_(STEP[f"lora_{decoder}_state/{PREFIX}{name}"])
    assert len(updates) == sum(name.startswith(f"lora_{decoder}_state/") for name in STEP.tensors)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    ids, mask = STEP[f"in/{kind}_batch/input_ids"], torch.ones(())
    for name in ("non_padding", "non_media", "prompt"):
        mask = mask * STEP[f"in/{kind}_batch/{name}_mask"]
    counts = {name: int(STEP[f"in/{kind}_batch/num_{name}"].sum()) for name in ("images", "videos")}
    return {"input_ids": ids, "loss_mask": mask, **WEIGHTS["bloom"].media(**counts)}


@pytest.mark.parametrize("decoder", RUNS)
def test_gradients_and_one_step(decoder: str) -> None:
    run, kind = RUNS[decoder]
    expected, model, inputs = STEP.facts["runs"][run], tuned(decoder).train(), batch(kind)
    mask = inputs.pop("loss_mask")

    def loss() -> Tensor:
        labels = inputs["input_ids"].clone()
        labels[:, 1:][mask != 1] = -100
        return model(**inputs, labels=labels).loss

    found = loss()
    assert_near(found.detach(), torch.tensor(expected["loss"]))
    found.backward()
    trained = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    assert {f"{PREFIX}{name}" for name in trained} == expected["grad_l2"].keys()
    for name, weights in trained.items():
        assert weights.grad is not None
        assert float(weights.grad.norm()) == pytest.approx(expected["grad_l2"][f"{PREFIX}{name}"], rel=1e-4)
    step = expected["step"]
    total = torch.nn.utils.clip_grad_norm_(trained.values(), step["clip"])
    assert float(total) == pytest.approx(step["total_grad_norm_before_clip"], rel=1e-4)
    torch.optim.AdamW(trained.values(), lr=step["lr"], weight_decay=step["weight_decay"]).step()
    assert float(loss().detach()) == pytest.approx(step["loss_after_step"], rel=1e-4)


@pytest.mark.parametrize("decoder", RUNS)
@torch.no_grad()
def test_both_exports_have_the_logits_of_the_tuned_model(decoder: str, tmp_path: Path) -> None:
    inputs = {name: value for name, value in batch(RUNS[decoder][1]).items() if name != "loss_mask"}
    base, folder = tmp_path / "base", tmp_path / "tuned"
    WEIGHTS[decoder].model().save_pretrained(base)
    model = tuned(decoder)
    model.save_pretrained(folder, state_dict=merged_weights(model))
    save_adapter(model, str(base), folder)
    logits = model(**inputs).logits
    merged = MplugOwlForConditionalGeneration.from_pretrained(folder).eval()
    assert_near(merged(**inputs).logits, logits)
    untuned = MplugOwlForConditionalGeneration.from_pretrained(base).eval()
    assert (untuned(**inputs).logits - logits).abs().max() > 0.1
    assert_near(PeftModel.from_pretrained(untuned, folder / "adapter")(**inputs).logits, logits)
