"""Tensor names of published checkpoints, and their conversion to ours.

A table maps modules to modules, with {} for the layer number. The last part of a name (weight, bias, …) is kept. An
entry can also be a full name.
"""

import re

import torch
from torch import Tensor

DECODER = {
    "embedding.word_embeddings": "transformer.wte",
    "embedding.position_embeddings": "transformer.wpe",
    "encoder.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
    "encoder.layers.{}.self_attention.query_key_value": "transformer.h.{}.attn.c_attn",
    "encoder.layers.{}.self_attention.dense": "transformer.h.{}.attn.c_proj",
    "encoder.layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
    "encoder.layers.{}.mlp.dense_h_to_4h": "transformer.h.{}.mlp.c_fc",
    "encoder.layers.{}.mlp.dense_4h_to_h": "transformer.h.{}.mlp.c_proj",
    "encoder.final_layernorm": "transformer.ln_f",
}
"""Megatron's GPT-3 -> GPT2LMHeadModel."""

VISION = {"patch_embed.proj": "patch_embed", "blocks.{}.temporal_ln": "blocks.{}.temporal_norm"}
"""Vision encoder of the original code -> TimeSformer. All other names are the same, and those of a timm ViT."""

BRIDGE_AND_HEADS = {
    "learnable_queries": "abstractor.queries",
    "attn_pool.norm1": "abstractor.norm_queries",
    "attn_pool.normk": "abstractor.norm_tokens",
    "attn_pool.attn": "abstractor.attn",
    "attn_pool.attn.out_proj": "abstractor.attn.out_proj",
    "attn_pool.norm2": "abstractor.norm_mlp",
    "attn_pool.mlp.fc1": "abstractor.mlp.fc1",
    "attn_pool.mlp.fc2": "abstractor.mlp.fc2",
    "visual_fc": "visual_projection",
    "visual_norm": "visual_norm",
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "temp": "temperature",
    "cls_head.0": "classifier.0",
    "cls_head.2": "classifier.2",
}

OPENAI_CLIP = {
    "visual.class_embedding": "cls_token",
    "visual.positional_embedding": "pos_embed",
    "visual.conv1": "patch_embed.proj",
    "visual.ln_pre": "norm_pre",
    "visual.transformer.resblocks.{}.ln_1": "blocks.{}.norm1",
    "visual.transformer.resblocks.{}.attn.in_proj_weight": "blocks.{}.attn.qkv.weight",
    "visual.transformer.resblocks.{}.attn.in_proj_bias": "blocks.{}.attn.qkv.bias",
    "visual.transformer.resblocks.{}.attn.out_proj": "blocks.{}.attn.proj",
    "visual.transformer.resblocks.{}.ln_2": "blocks.{}.norm2",
    "visual.transformer.resblocks.{}.mlp.c_fc": "blocks.{}.mlp.fc1",
    "visual.transformer.resblocks.{}.mlp.c_proj": "blocks.{}.mlp.fc2",
    "visual.ln_post": "norm",
}
"""OpenAI's CLIP -> names of timm."""

TRANSFORMERS_CLIP = {
    "vision_model.embeddings.class_embedding": "cls_token",
    "vision_model.embeddings.position_embedding.weight": "pos_embed",
    "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    "vision_model.pre_layrnorm": "norm_pre",
    "vision_model.encoder.layers.{}.layer_norm1": "blocks.{}.norm1",
    "vision_model.encoder.layers.{}.self_attn.q_proj": "blocks.{}.attn.q",
    "vision_model.encoder.layers.{}.self_attn.k_proj": "blocks.{}.attn.k",
    "vision_model.encoder.layers.{}.self_attn.v_proj": "blocks.{}.attn.v",
    "vision_model.encoder.layers.{}.self_attn.out_proj": "blocks.{}.attn.proj",
    "vision_model.encoder.layers.{}.layer_norm2": "blocks.{}.norm2",
    "vision_model.encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "vision_model.encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "vision_model.post_layernorm": "norm",
}
"""CLIP in transformers -> names of timm, with separate q, k and v."""

PIECES = {"word_embeddings": 0, "query_key_value": 0, "dense_h_to_4h": 0, "self_attention.dense": 1, "dense_4h_to_h": 1}
"""Dimension in which Megatron's tensor parallelism splits a weight. Biases are only split with dimension 0."""


def translate(name: str, table: dict[str, str]) -> str | None:
    """Our name of a tensor; None if it is not in the table."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
    module, dot, leaf = pattern.rpartition(".")
    for key, end in ((name, ""), (pattern, ""), (module, dot + leaf), (name.rpartition(".")[0], dot + leaf)):
        if key in table:
            return table[key].format(*numbers) + end
    return None


def piece_dimension(name: str) -> int | None:
    """Dimension in which a tensor is split by tensor parallelism; None if every rank holds all of it."""
    for module, dimension in PIECES.items():
        if name.endswith(f"{module}.weight") or (dimension == 0 and name.endswith(f"{module}.bias")):
            return dimension
    return None


def megatron_to_gpt2(target: str, tensor: Tensor, num_heads: int) -> Tensor:
    """Head-major q, k, v (heads, 3, head width) become q, k, v; linear weights (out, in) become Conv1D's (in, out)."""
    if ".c_attn." in target:
        tensor = tensor.view(num_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
    if target.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        tensor = tensor.T
    return tensor


def timesformer_names(timm_name: str) -> str:
    """Our name of a timm ViT's tensor. The bias of the keys is dropped: it has no effect, since it adds the same value
    to all scores of a query."""
    name = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", timm_name)
    if name.endswith("attn.qkv.bias"):
        return f"{name.removesuffix('qkv.bias')}q_bias, {name.removesuffix('qkv.bias')}v_bias"
    return translate(name, VISION) or name


def timm_to_timesformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT with names of timm, with joint or separate q, k and v -> tensors of TimeSformer."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            tensor = torch.cat([state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"])
        elif ".attn.k." in name or ".attn.v." in name:
            continue
        ours = timesformer_names(name).split(", ")
        # clone: safetensors does not save two names of one tensor
        parts = [tensor] if len(ours) == 1 else [part.clone() for part in tensor.chunk(3)[::2]]
        tensors |= zip(ours, parts, strict=True)
    for name in ("cls_token", "pos_embed"):
        while tensors[name].ndim < 3:  # CLIP's embeddings have no leading dimension of 1
            tensors[name] = tensors[name][None]
    return tensors
