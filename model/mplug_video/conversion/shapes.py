"""Derives the configuration of a network from the tensors of a published checkpoint and the files next to it."""

import json
import math
from collections.abc import Collection
from pathlib import Path

from torch import Tensor
from transformers import GPT2Config, PreTrainedTokenizerFast

from model.errors import ConversionError
from model.mplug_video.configuration import MATCHING_CLASSES, TimeSformerConfig
from model.mplug_video.tokenization import load_tokenizer


def load_source_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConversionError(f"{folder} must hold tokenizer.json, as ModelScope's GPT-3 folders do.")
    return load_tokenizer(path)


def gpt2_config(folder: Path, tokenizer: PreTrainedTokenizerFast, state: dict[str, Tensor], prefix: str) -> GPT2Config:
    """Sizes from the tensors; other settings from config.json, with Megatron's defaults."""
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} must hold config.json, as ModelScope's GPT-3 folders do.")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    first_mlp = f"{prefix}encoder.layers.0.mlp.dense_h_to_4h.weight"
    words, positions = f"{prefix}embedding.word_embeddings.weight", f"{prefix}embedding.position_embeddings.weight"
    validate_present([words, positions, first_mlp], state, "a GPT-3")
    layers = {name.removeprefix(f"{prefix}encoder.layers.").split(".")[0] for name in state if "encoder.layers" in name}
    heads, width = settings.get("num_attention_heads", settings.get("n_head", 0)), state[words].shape[1]
    if not heads or width % heads:
        raise ConversionError(f"num_attention_heads in {folder}/config.json must divide {width}, but it is {heads}.")
    dropout, attention_dropout = settings.get("hidden_dropout", 0.1), settings.get("attention_dropout", 0.1)
    return GPT2Config(
        vocab_size=state[words].shape[0],
        n_positions=state[positions].shape[0],
        n_embd=width,
        n_layer=len(layers),
        n_head=heads,
        n_inner=state[first_mlp].shape[0],
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=settings.get("layernorm_epsilon", settings.get("layer_norm_epsilon", 1e-12)),
        resid_pdrop=settings.get("resid_pdrop", dropout),
        embd_pdrop=settings.get("embd_pdrop", dropout),
        attn_pdrop=settings.get("attn_pdrop", attention_dropout),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def infer_vision_config(tensors: dict[str, Tensor], heads: int, num_frames: int) -> TimeSformerConfig:
    """Sizes from tensors with TimeSformer's names. They do not determine the number of heads."""
    width, _, patch, _ = tensors["patch_embed.weight"].shape
    patches = tensors["pos_embed"].shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConversionError(f"pos_embed must hold one class token and a square of patches, but it holds {patches}.")
    if width % heads:
        raise ConversionError(
            f"the number of vision heads must divide the width {width}, but it is {heads}. Set --vision-heads."
        )
    return TimeSformerConfig(
        image_size=side * patch,
        patch_size=patch,
        num_frames=num_frames,
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_attention_heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] // width,
        clip_stem="norm_pre.weight" in tensors,
    )


def read_class_list(path: Path) -> list[str]:
    """The categories of a classname.json, in the order of their numbers."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} must be JSON, a list of names or name: number: {error}.") from error
    return sorted(names, key=names.__getitem__) if isinstance(names, dict) else list(names)


def validate_class_names(state: dict[str, Tensor], names: list[str] | None) -> list[str] | None:
    if "cls_head.2.weight" not in state:
        return None
    count = state["cls_head.2.weight"].shape[0]
    if names is None and count == len(MATCHING_CLASSES):
        return MATCHING_CLASSES
    if names is None or len(names) != count:
        given = "none were given" if names is None else f"{len(names)} were given"
        raise ConversionError(f"the head has {count} classes, but {given}. Give them with --class-names.")
    return names


def validate_present(names: list[str], state: Collection[str], what: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        found = ", ".join(list(state)[:3])
        raise ConversionError(f"{what} must hold {missing[0]}, but it is missing. The first tensors found are {found}.")


def validate_patches(image_size: int, patch_size: int) -> int:
    if image_size % patch_size:
        raise ConversionError(
            f"the image size must be a multiple of the patch size {patch_size}, but it is {image_size}."
        )
    return image_size
