"""What both model families do with their decoder, any causal language model of transformers.

A prompt is a sequence of embeddings: visual vectors and text. B prompts of S positions, N texts that continue each of
them, L tokens of these texts, D decoder width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from model.errors import DataError

TOKENS_AT_ONCE = 512
"""Number of tokens, of the texts of one prompt, that are read together."""
WORDS_AT_ONCE = 1024
"""Part of the vocabulary whose logits are computed together: few enough to stay in a cache, 1.7 times as fast."""
Texts = Sequence[Sequence[list[int]]]
"""The token IDs of N texts for each of B prompts."""


class ReadPrompts:
    """Prompts in the KV cache of a decoder, which texts continue without a copy of the cache.

    The texts of a prompt are read in one row, with a mask by which each token attends to the prompt and to the tokens
    of its own text before it. A common start of texts is read once.
    """

    def __init__(self, decoder: PreTrainedModel, embeddings: Tensor, mask: Tensor | None = None) -> None:
        """Reads prompts (B, S, D). `mask` (B, S) is 0 at padding, wherever it is."""
        self.decoder, self.cache = decoder, DynamicCache(config=decoder.config)
        self.mask = torch.ones(embeddings.shape[:2], device=embeddings.device).long() if mask is None else mask
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            self._read(embeddings, self.positions, self.mask)

    @torch.no_grad()
    def last_states(self, texts: Texts) -> Tensor:
        """The state of the last token of each text, (B, N, D)."""
        found = []
        for _, trees, states in self._groups(texts):
            last = torch.tensor([[path[-1] for path in tree.paths] for tree in trees], device=states.device)
            found.append(states.gather(1, last[..., None].expand(-1, -1, states.shape[-1])))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def log_likelihoods(self, texts: Texts, starts: Sequence[Sequence[int]]) -> Tensor:
        """Log likelihoods (B, N) of the texts, fp32, summed over their tokens from number `starts` (B, N) on.

        The sums favour short texts. A start is at least 1: the first token is only read.
        """
        scores = torch.zeros(len(texts), len(texts[0]), device=self.mask.device)
        contexts = [[text[:-1] for text in own] for own in texts]
        for first, trees, states in self._groups(contexts):
            # of every scored token: its text, the node before it, and itself
            rows, nodes, targets = list[int](), list[int](), list[int]()
            for clip, tree in enumerate(trees):
                for text, path in enumerate(tree.paths, start=first):
                    start = starts[clip][text]
                    rows += [clip * scores.shape[1] + text] * (len(path) - start + 1)
                    nodes += [clip * states.shape[1] + node for node in path[start - 1 :]]
                    targets += texts[clip][text][start:]
            found = self._log_probabilities(states.flatten(0, 1), nodes, targets)
            scores.view(-1).index_add_(0, torch.tensor(rows, device=found.device), found)
        return scores

    def _log_probabilities(self, states: Tensor, nodes: list[int], targets: list[int]) -> Tensor:
        """Log probabilities of `targets` after `nodes`, rows of states, in fp32. Each row is normalised once."""
        rows, place = torch.unique(torch.tensor(nodes, device=states.device), return_inverse=True)
        head, wanted = self.decoder.get_output_embeddings(), torch.tensor(targets, device=states.device)
        before, parts = states[rows], []
        bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
        for weight, shift in zip(head.weight.split(WORDS_AT_ONCE), bias.split(WORDS_AT_ONCE), strict=True):
            parts.append(F.linear(before, weight, shift).float().logsumexp(dim=1))
        logits = (before[place] * head.weight[wanted]).sum(dim=1) + bias[wanted]
        return logits.float() - torch.stack(parts).logsumexp(dim=0)[place]

    def _groups(self, texts: Texts) -> Iterator[tuple[int, list["TextTree"], Tensor]]:
        """Reads consecutive texts of all prompts together: the number of the first, their trees, states (B, L, D)."""
        lengths = [max(len(own[text]) for own in texts) for text in range(len(texts[0]))]
        first = 0
        while first < len(lengths):
            end, total = first + 1, lengths[first]
            while end < len(lengths) and total + lengths[end] <= TOKENS_AT_ONCE:
                total += lengths[end]
                end += 1
            trees = [text_tree(own[first:end]) for own in texts]
            yield first, trees, self._read_trees(trees)
            first = end

    def _read_trees(self, trees: Sequence["TextTree"]) -> Tensor:
        """The states (B, L, D) of the tokens of trees."""
        device, width = self.mask.device, max(len(tree.tokens) for tree in trees)
        ids, depths = (
            pad_sequence([torch.tensor(row) for row in rows], True).to(device)
            for rows in ([tree.tokens for tree in trees], [tree.depths for tree in trees])
        )  # (B, L)
        node = torch.arange(width, device=device)
        ends = (node + 1).repeat(len(trees), 1)  # padding sees itself
        for row, tree in zip(ends, trees, strict=True):
            row[: len(tree.ends)] = torch.tensor(tree.ends)
        inside = (node <= node[:, None]) & (node[:, None] < ends[:, None])  # (B, L, L), whether a key is above a query
        allowed = torch.cat((self.mask.bool()[:, None].expand(-1, width, -1), inside), dim=2)  # (B, L, S + L)
        embeddings = self.decoder.get_input_embeddings()(ids)
        blocked = torch.finfo(embeddings.dtype).min
        mask = torch.zeros_like(allowed, dtype=embeddings.dtype).masked_fill(~allowed, blocked)[:, None]
        positions = self.mask.sum(dim=1, keepdim=True) + depths
        with _at_positions(self.decoder, torch.cat((self.positions, positions), dim=1)):
            states = self._read(embeddings, positions, mask)
        self.cache.crop(-width)  # removes the texts
        return states

    def _read(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        options = {} if _has_alibi(self.decoder) else {"position_ids": positions}
        read = self.decoder.base_model(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=self.cache, use_cache=True, **options
        )
        return read.last_hidden_state


@dataclass
class TextTree:
    """Texts as a tree of their tokens in preorder, with common beginnings once."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """For each token, the number after that of its last descendant."""
    paths: list[list[int]] = field(default_factory=list)
    """For each text, the numbers of its tokens."""


def text_tree(texts: Sequence[list[int]]) -> TextTree:
    tree = TextTree(paths=[[]] * len(texts))
    path: list[int] = []
    last: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: texts[row]):  # common beginnings follow each other
        text, common = texts[row], 0
        while common < min(len(last), len(text)) and last[common] == text[common]:
            common += 1
        for node in path[common:]:
            tree.ends[node] = len(tree.tokens)
        path = [*path[:common], *range(len(tree.tokens), len(tree.tokens) + len(text) - common)]
        tree.tokens += text[common:]
        tree.depths += range(common, len(text))
        tree.ends += [0] * (len(text) - common)
        tree.paths[row], last = path, text
    for node in path:
        tree.ends[node] = len(tree.tokens)
    return tree


def _has_alibi(decoder: PreTrainedModel) -> bool:
    """Whether positions enter a decoder as a bias of its attention, which transformers derives from a 2D mask."""
    return decoder.config.model_type == "bloom"


@contextmanager
def _at_positions(decoder: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Makes Bloom see its keys at `positions` (B, S + L), which it does not take as an argument."""
    if not _has_alibi(decoder):
        yield
        return
    bloom, (batch, length) = decoder.base_model, positions.shape
    heads = bloom.num_heads
    slopes = bloom.build_alibi_tensor(torch.ones(1, 2, device=positions.device), heads, torch.float32)[:, 0, 1]
    bias = (slopes[:, None] * positions[:, None]).view(batch * heads, 1, length)
    bloom.build_alibi_tensor = lambda mask, num_heads, dtype: bias.to(dtype)
    try:
        yield
    finally:
        del bloom.build_alibi_tensor


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
