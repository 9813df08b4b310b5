"""What both model families do with their decoder, any causal language model of transformers.

A prompt is a sequence of embeddings (1, S, D): visual vectors and text. R candidate texts, L tokens, D decoder width.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from model.errors import DataError
from model.losses import losses_at

CANDIDATES_AT_ONCE = 16
"""Number of texts of similar length that are decoded together. Each has a copy of the prompt's KV cache."""


@torch.no_grad()
def decode_candidates(
    decoder: PreTrainedModel, prompt: Tensor, input_ids: Tensor, lengths: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decodes texts (R, L), of `lengths` (R,) tokens, that all continue one prompt.

    Yields groups of texts: their rows (r,), token IDs (r, l) and decoder states (r, l, D), without common padding. The
    prompt and the common start of all texts are read once; each text continues from their KV cache.
    """
    agreeing = (input_ids == input_ids[:1]).all(dim=0).long().cumprod(dim=0).sum()
    common = int(torch.minimum(agreeing, lengths.min() - 1))
    embeddings = decoder.get_input_embeddings()(input_ids)  # (R, L, D)
    cache = DynamicCache(config=decoder.config)
    start = torch.cat((prompt, embeddings[:1, :common]), dim=1)  # (1, S + common, D)
    read = decoder.base_model(inputs_embeds=start, past_key_values=cache, use_cache=True).last_hidden_state
    for rows in torch.split(lengths.argsort(), CANDIDATES_AT_ONCE):
        longest = int(lengths[rows[-1]])
        own = deepcopy(cache)
        own.batch_repeat_interleave(len(rows))
        each = decoder.base_model(inputs_embeds=embeddings[rows, common:longest], past_key_values=own, use_cache=True)
        shared = read[:, prompt.shape[1] :].expand(len(rows), -1, -1)
        yield rows, input_ids[rows, :longest], torch.cat((shared, each.last_hidden_state), dim=1)


@torch.no_grad()
def score_candidates(decoder: PreTrainedModel, prompt: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Log likelihoods (R,) of texts (R, L) after a prompt, summed over tokens 1..L-1 where `loss_mask` (R, L - 1) is 1.

    The sums favour short texts.
    """
    position = torch.arange(2, input_ids.shape[1] + 1, device=loss_mask.device)
    lengths = (position * loss_mask.bool()).amax(dim=1).clamp(min=2)  # up to the last scored token
    scores = prompt.new_empty(len(input_ids), dtype=torch.float32)
    head = decoder.get_output_embeddings()
    for rows, ids, states in decode_candidates(decoder, prompt, input_ids, lengths):
        scores[rows] = -losses_at(states, head, ids, loss_mask[rows, : ids.shape[1] - 1]).sum(dim=1)
    return scores


def room_for(config: PreTrainedConfig, length: int, wanted: int) -> int:
    """Number of tokens to generate after `length` tokens: `wanted`, or as many as the decoder's positions allow.

    Raises DataError if there is no room. Bloom has no limit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length >= positions:
        raise DataError(f"a conversation must have fewer than {positions} tokens, but this one has {length}.")
    return wanted if positions is None else min(wanted, positions - length)


def without_dropout(config: PreTrainedConfig) -> None:
    """Sets every dropout of a decoder's configuration to zero."""
    config.update({name: 0.0 for name in config.to_dict() if "drop" in name})
