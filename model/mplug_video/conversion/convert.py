"""Published weights -> folders that `from_pretrained` loads: `mplug convert SOURCE DEST`.

The kind of source is detected from its tensors: a ModelScope GPT-3 folder (also tensor-parallel), an image encoder
(CLIP or a timm ViT), or a trained mPLUG-Video. Every tensor is mapped, dropped with a reason, or an error.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from model.conversion import Conversion, Recipe, write_conversion
from model.errors import ConversionError
from model.mplug_video.configuration import MPlugVideoConfig, TimeSformerConfig
from model.mplug_video.conversion.names import (
    BRIDGE_AND_HEADS,
    DECODER,
    OPENAI_CLIP,
    TRANSFORMERS_CLIP,
    VISION,
    megatron_to_gpt2,
    piece_dimension,
    timesformer_names,
    timm_to_timesformer,
    translate,
)
from model.mplug_video.conversion.shapes import (
    gpt2_config,
    infer_vision_config,
    load_source_tokenizer,
    validate_class_names,
    validate_patches,
    validate_present,
)
from model.mplug_video.modeling import (
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
)
from model.mplug_video.processing import MPlugVideoProcessor
from model.mplug_video.vision import TimeSformer, resize_frames, resize_positions
from model.weight_files import open_checkpoint

GPT3_PREFIX, GPT3_IN_MODEL = "language_model.", "text_decoder.dist_model.language_model."
VISION_PREFIX = "visual_encoder."
PIECES = "mp_rank_*_model_states.pt"
"""Checkpoint file of a tensor-parallel rank, in the folder or, for ModelScope, in its subfolder `model`."""
KEY_BIAS = "a bias of keys has no effect: it adds the same value to all scores of a query"


def convert_weights(
    source: Path,
    dest: Path,
    *,
    decoder: Path | None = None,
    vision_heads: int = 8,
    image_size: int | None = None,
    num_frames: int | None = None,
    class_names: list[str] | None = None,
    drop: Iterable[str] = (),
) -> Conversion:
    """Writes `dest`, which must not exist, and returns a record of every tensor.

    A trained model needs `decoder`, a GPT-3 folder of ModelScope or a converted one, for its tokenizer and number of
    heads. Tensors whose names match a pattern of `drop` are skipped. Raises ConversionError.
    """
    pieces = sorted(source.glob(PIECES)) or sorted(source.glob(f"model/{PIECES}"))
    states = [open_checkpoint(piece) for piece in pieces or [source]]
    dropped = {name: "asked for (--drop)" for pattern in drop for name in states[0] if fnmatch(name, pattern)}
    states = [{name: tensor for name, tensor in state.items() if name not in dropped} for state in states]
    if any(name.startswith(GPT3_PREFIX) for name in states[0]):
        conversion = _decoder(source, states)
    elif any(name.startswith(VISION_PREFIX) for name in states[0]):
        conversion = _model(states, decoder, vision_heads, (image_size, num_frames), class_names)
    else:
        conversion = _vision(states[0], vision_heads, image_size, num_frames or TimeSformerConfig().num_frames)
    conversion.dropped |= dropped
    write_conversion(conversion, source, dest)
    return conversion


def _decoder(folder: Path, states: list[dict[str, Tensor]]) -> Conversion:
    """`states` are the tensor-parallel parts; a single one if the checkpoint is not parallel."""
    if not folder.is_dir():
        raise ConversionError(
            f"{folder} holds weights of a GPT-3 only: give the folder that holds config.json and {folder.name}."
        )
    recipes, forms = _whole(states)
    tokenizer = load_source_tokenizer(folder)
    config = gpt2_config(folder, tokenizer, forms, GPT3_PREFIX)
    conversion = Conversion(config, GPT2LMHeadModel, processor=tokenizer)
    for name, recipe in recipes.items():
        _map_decoder(conversion, name, recipe, GPT3_PREFIX, "")
    return conversion


def _whole(states: list[dict[str, Tensor]]) -> tuple[dict[str, Recipe], dict[str, Tensor]]:
    """The rule of each tensor, and its shape as a meta tensor."""
    names = dict.fromkeys(name for state in states for name in state)
    recipes = {name: _joined(name, states) for name in names}
    return recipes, {name: recipe.make("meta") for name, recipe in recipes.items()}


def _joined(name: str, states: list[dict[str, Tensor]]) -> Recipe:
    """The whole tensor: its concatenated parts, or the first of equal copies."""
    if not all(name in state for state in states):
        raise ConversionError(f"{name} must be in all {len(states)} parts of the checkpoint, but it is not.")
    parts = [state[name] for state in states]
    dimension = piece_dimension(name)
    if dimension is not None:
        return Recipe(parts, dimension)
    if not all(torch.equal(part, parts[0]) for part in parts):
        raise ConversionError(f"{name} must be the same in all {len(parts)} parts of the checkpoint, it differs.")
    return Recipe(parts[:1])


def _vision(state: dict[str, Tensor], heads: int, image_size: int | None, num_frames: int) -> Conversion:
    conversion = Conversion(TimeSformerConfig(), TimeSformer)
    names = {name: name for name in state}  # the source's -> timm's
    for table in (OPENAI_CLIP, TRANSFORMERS_CLIP):
        translated = {name: translate(name, table) for name in state}
        if "cls_token" in translated.values():
            names = {name: ours for name, ours in translated.items() if ours}
            conversion.dropped = dict.fromkeys((n for n in state if n not in names), "not of CLIP's image encoder")
    for name, timm_name in list(names.items()):
        if "head" in timm_name:
            conversion.dropped[name] = "a classifier of images"
            del names[name]
    validate_present(["cls_token", "pos_embed", "patch_embed.proj.weight"], names.values(), "an image encoder")
    tensors = timm_to_timesformer({timm_name: state[name] for name, timm_name in names.items()})
    conversion.mapped = {name: timesformer_names(timm_name) for name, timm_name in names.items()}
    for name, timm_name in names.items():
        if timm_name.endswith("attn.k.bias"):
            del conversion.mapped[name]
        if timm_name.endswith(("attn.k.bias", "attn.qkv.bias")):
            conversion.dropped[name if ".k." in timm_name else f"{name} (keys)"] = KEY_BIAS
    config = conversion.config = infer_vision_config(tensors, heads, num_frames)
    config.image_size = validate_patches(image_size or config.image_size, config.patch_size)
    tensors["pos_embed"] = resize_positions(tensors["pos_embed"], config.image_size // config.patch_size)
    torch.manual_seed(0)  # so that the same source gives the same bytes
    fresh = TimeSformer(config).state_dict()
    conversion.initialised = [name for name in fresh if name not in tensors and "temporal" in name]
    tensors |= {name: fresh[name] for name in conversion.initialised}
    conversion.recipes = {name: Recipe([tensor]) for name, tensor in tensors.items()}
    return conversion


def _model(
    states: list[dict[str, Tensor]],
    decoder: Path | None,
    heads: int,
    size: tuple[int | None, int | None],
    class_names: list[str] | None,
) -> Conversion:
    if decoder is None:
        raise ConversionError(
            "a trained model needs the folder of its GPT-3 too, for the tokenizer. Give it with --decoder."
        )
    tokenizer = load_source_tokenizer(decoder)
    recipes, state = _whole(states)
    validate_present(["learnable_queries", f"{VISION_PREFIX}temporal_embed"], state, "a trained model")
    num_frames = state[f"{VISION_PREFIX}temporal_embed"].shape[1]
    vision = {_vision_name(name): tensor for name, tensor in state.items() if name.startswith(VISION_PREFIX)}
    vision_config = infer_vision_config(vision, heads, num_frames)
    vision_config.image_size = validate_patches(size[0] or vision_config.image_size, vision_config.patch_size)
    vision_config.num_frames = size[1] or vision_config.num_frames
    config = MPlugVideoConfig(
        vision_config=vision_config,
        text_config=gpt2_config(decoder, tokenizer, state, GPT3_IN_MODEL),
        num_queries=state["learnable_queries"].shape[1],
        query_norm="visual_norm.weight" in state,
        use_contrastive="vision_proj.weight" in state,
        contrastive_size=state["vision_proj.weight"].shape[0] if "vision_proj.weight" in state else 256,
        class_names=validate_class_names(state, class_names),
        released_beam_search=True,
    )
    processor = MPlugVideoProcessor(
        tokenizer, image_size=vision_config.image_size, num_frames=vision_config.num_frames, resample="nearest"
    )
    conversion = Conversion(config, _architecture(config), processor=processor)
    side = vision_config.image_size // vision_config.patch_size
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        f"{VISION_PREFIX}pos_embed": partial(resize_positions, side=side),
        f"{VISION_PREFIX}temporal_embed": partial(resize_frames, num_frames=vision_config.num_frames),
        "temp": partial(torch.reshape, shape=(1,)),
    }
    for name, recipe in recipes.items():
        recipe = replace(recipe, transform=transforms.get(name, recipe.transform))
        if name.startswith(GPT3_IN_MODEL):
            _map_decoder(conversion, name, recipe, GPT3_IN_MODEL, "decoder.")
        elif name.startswith(VISION_PREFIX):
            conversion.map(name, f"vision_encoder.{_vision_name(name)}", recipe)
        else:
            conversion.map(name, translate(name, BRIDGE_AND_HEADS), recipe)
    return conversion


def _vision_name(name: str) -> str:
    name = name.removeprefix(VISION_PREFIX)
    return translate(name, VISION) or name


def _architecture(config: MPlugVideoConfig) -> type[PreTrainedModel]:
    """The class of a trained model. Retrieval models have the tensors of contrastive pre-training, and load from it."""
    if config.class_names:
        return MPlugVideoForClassification
    return MPlugVideoForPreTraining if config.use_contrastive else MPlugVideoForConditionalGeneration


def _map_decoder(conversion: Conversion, name: str, recipe: Recipe, prefix: str, ours: str) -> None:
    target = translate(name.removeprefix(prefix), DECODER)
    if target:
        heads = conversion.config.get_text_config().num_attention_heads
        recipe = replace(recipe, transform=partial(megatron_to_gpt2, target, num_heads=heads))
    conversion.map(name, target and ours + target, recipe)
