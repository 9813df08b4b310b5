"""`mplug convert` with checkpoints of mPLUG-Owl's trainer, built from the recorded model in its published layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from cli.convert import convert_to
from model import manifest
from model.errors import ConfigError, ConversionError
from model.mplug_owl_video import MplugOwlForConditionalGeneration, MplugOwlProcessor
from model.mplug_owl_video.conversion import convert_mplug_owl
from model.weight_files import open_checkpoint
from tests.helpers.paths import FIXTURES

PUBLISHED = FIXTURES / "mplug_owl_video" / "hf_checkpoint"
WORDS, HEAD = "language_model.transformer.word_embeddings.weight", "language_model.lm_head.weight"
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth")
IDS = torch.tensor([[1, 5, 9, 30, 7]])


class Settings:
    """An object that a checkpoint must not be able to create."""


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return open_checkpoint(PUBLISHED)


def trainer_folder(folder: Path, state: dict[str, Tensor], name: str = "pytorch_model.bin") -> Path:
    """A checkpoint folder of the trainer: weights, and files of its own that cannot be read safely."""
    folder.mkdir()
    torch.save(state, folder / name)
    for other in TRAINER_FILES:
        torch.save(Settings(), folder / other)
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded(folder: Path) -> MplugOwlForConditionalGeneration:
    return MplugOwlForConditionalGeneration.from_pretrained(folder).eval()


def test_a_checkpoint_of_all_weights_becomes_the_published_layout(published: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {name: tensor.clone() for name, tensor in published.items()}
    changed[WORDS] += 1  # another model than the base
    changed[HEAD] = changed[WORDS]
    source = trainer_folder(tmp_path / "checkpoint-500", {f"module.{name}": t for name, t in changed.items()})
    conversion = convert_mplug_owl(source, tmp_path / "model", base=PUBLISHED)
    assert conversion.from_base == []
    state = loaded(tmp_path / "model").state_dict()
    assert state.keys() == changed.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in changed.items())
    assert MplugOwlProcessor.from_pretrained(tmp_path / "model").tokenizer.eos_token_id is not None
    assert manifest.fetch_folder(str(tmp_path / "model")) == tmp_path / "model"
    report = json.loads((tmp_path / "model" / "conversion.json").read_text(encoding="utf-8"))
    assert report["dropped"] == {f"module.{HEAD}": f"the same as {WORDS}"}
    assert report["mapped"].keys() | report["dropped"].keys() == {f"module.{name}" for name in published}


def test_there_and_back_gives_the_same_bytes_of_every_weight(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.weight_files.SHARD_BYTES", 100_000)
    convert_mplug_owl(PUBLISHED, tmp_path / "adopted")
    assert len(list((tmp_path / "adopted").glob("model-*.safetensors"))) > 2
    convert_mplug_owl(tmp_path / "adopted", tmp_path / "back", format="bin")
    back = open_checkpoint(tmp_path / "back")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())
    sizes = [file.stat().st_size for file in (tmp_path / "back").glob("pytorch_model-*.bin")]
    assert len(sizes) > 2
    assert max(sizes) < 200_000
    index = json.loads((tmp_path / "back" / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == published.keys()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (PUBLISHED / name).read_bytes()
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(loaded(PUBLISHED)))


@pytest.fixture(scope="module")
def tuned() -> tuple[torch.nn.Module, Tensor]:
    """The published model with a random adapter of peft, and its logits."""
    torch.manual_seed(0)
    model = get_peft_model(
        loaded(PUBLISHED), LoraConfig(r=4, lora_alpha=12, target_modules=r"language_model\..*\.query_key_value")
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)
    return model.eval(), logits(model)


def test_an_adapter_is_merged_into_its_base(tuned: tuple[torch.nn.Module, Tensor], tmp_path: Path) -> None:
    model, expected = tuned
    model.save_pretrained(str(tmp_path / "adapter"))
    for other in TRAINER_FILES:
        torch.save(Settings(), tmp_path / "adapter" / other)
    conversion = convert_mplug_owl(tmp_path / "adapter", tmp_path / "merged", base=PUBLISHED)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)
    assert len(conversion.from_base) == len(load_file(tmp_path / "merged" / "model.safetensors"))


def test_all_weights_with_those_of_peft_are_merged(tuned: tuple[torch.nn.Module, Tensor], tmp_path: Path) -> None:
    """What the trainer wrote with earlier versions of peft. It has no configuration of peft."""
    model, expected = tuned
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(name.startswith("base_model.model.") for name in state)
    source = trainer_folder(tmp_path / "checkpoint-50", state)
    conversion = convert_mplug_owl(source, tmp_path / "merged", base=PUBLISHED, lora_alpha=12)
    assert conversion.from_base == []
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)


def test_the_kind_of_a_source_is_found_out(tuned: tuple[torch.nn.Module, Tensor], tmp_path: Path) -> None:
    convert_to(PUBLISHED, str(tmp_path / "adopted"), {"base": None, "decoder": None})
    assert (tmp_path / "adopted" / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"--decoder must be left out: .* is an mPLUG-Owl\."):
        convert_to(PUBLISHED, str(tmp_path / "other"), {"decoder": tmp_path})
    torch.save({"visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "trained.pt")
    with pytest.raises(ConfigError, match=r"--base must be left out: .*trained\.pt is not an mPLUG-Owl\."):
        convert_to(tmp_path / "trained.pt", str(tmp_path / "other"), {"base": PUBLISHED})


def test_sources_that_are_refused(
    published: dict[str, Tensor], tuned: tuple[torch.nn.Module, Tensor], tmp_path: Path
) -> None:
    whole = trainer_folder(tmp_path / "whole", published)
    image_only = {name: tensor for name, tensor in published.items() if "temporal" not in name}
    differs = {**published, HEAD: published[HEAD] + 1}
    unknown = {**published, "value_head.weight": torch.zeros(2)}
    tuned[0].save_pretrained(str(tmp_path / "adapter"))
    half = {name: tensor for name, tensor in open_checkpoint(tmp_path / "adapter").items() if "lora_A" in name}
    layer = "language_model.transformer.h.0.self_attention.query_key_value.weight"
    shutil.copytree(tmp_path / "adapter", tmp_path / "dora")
    settings = json.loads((tmp_path / "dora" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    for source, base, message in (
        (whole, None, r"whole has no config\.json: name the published model that it was trained from with --base\."),
        (whole, tmp_path, r"must hold config\.json, as a published model does"),
        (trainer_folder(tmp_path / "image", image_only), tmp_path / "image-base", r"is missing in the source"),
        (
            trainer_folder(tmp_path / "differs", differs),
            PUBLISHED,
            "lm_head.weight must equal .*word_embeddings.weight",
        ),
        (
            trainer_folder(tmp_path / "unknown", unknown),
            PUBLISHED,
            r"value_head\.weight is not known.* --drop value_head",
        ),
        (trainer_folder(tmp_path / "half", half), PUBLISHED, "must have both matrices of LoRA, but it has only A"),
        (tmp_path / "dora", PUBLISHED, "must not set use_dora"),
        (
            trainer_folder(tmp_path / "rest", half),
            tmp_path / "rest-base",
            f"{layer} must be in the checkpoint or in --base",
        ),
    ):
        if base and not base.exists():  # a published model without weights of video, or of the decoder
            kept = {name: tensor for name, tensor in image_only.items() if name != layer}
            shutil.copytree(PUBLISHED, base, ignore=shutil.ignore_patterns("pytorch_model*"))
            torch.save(kept, base / "pytorch_model.bin")
        with pytest.raises(ConversionError, match=message):
            convert_mplug_owl(source, tmp_path / "never", base=base)
        assert not (tmp_path / "never").exists()


def test_a_checkpoint_with_other_objects_is_not_executed(tmp_path: Path) -> None:
    source = trainer_folder(tmp_path / "odd", {"query_tokens": Settings()})  # type: ignore[dict-item]
    with pytest.raises(ConversionError, match="would execute code from the file"):
        convert_mplug_owl(source, tmp_path / "never", base=PUBLISHED)
