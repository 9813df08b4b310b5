"""The beam search of the released models, batched and with a KV cache.

It differs from the search of transformers in three points, which published captions depend on:

- The score of a hypothesis is the sum of its log probabilities divided by the *width* of the buffer (prompt and all new
  tokens that fit), which is the same for all: there is no length normalisation.
- A clip is done when `num_beams` hypotheses are finished and the worst of them is at least as good as the best
  candidate of the step divided by the number of tokens *so far*. The divisors differ, so the search stops early.
- If the buffer is full first, unfinished beams count as hypotheses.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel


class Hypotheses:
    """The best texts of one clip, best first: (score, new token IDs). A finished text ends with the end token."""

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams
        self.found: list[tuple[float, list[int]]] = []
        self.done = False

    def add(self, score: float, ids: list[int]) -> None:
        self.found.append((score, ids))
        self.found.sort(key=lambda item: -item[0])
        del self.found[self.num_beams :]

    def close_if_better_than(self, attainable: float) -> None:
        self.done = len(self.found) == self.num_beams and self.found[-1][0] >= attainable


@torch.no_grad()
def beam_search(
    decoder: PreTrainedModel, embeddings: Tensor, *, num_beams: int, max_new_tokens: int, width: int, end: int
) -> list[Hypotheses]:
    """Continues each row of `embeddings` (B, S, D), a visual prefix and a prompt, by at most `max_new_tokens`."""
    batch, device = len(embeddings), embeddings.device
    rows = [Hypotheses(num_beams) for _ in range(batch)]
    cache = DynamicCache(config=decoder.config)
    logits = _next_logits(decoder, embeddings, cache).repeat_interleave(num_beams, dim=0)  # (B · beams, V)
    cache.batch_repeat_interleave(num_beams)
    # all beams of a row are equal at the start, so only one of them counts
    sums = torch.full((batch, num_beams), -torch.inf, device=device)
    sums[:, 0] = 0
    written = torch.empty((batch, num_beams, 0), dtype=torch.long, device=device)
    for length in range(1, max_new_tokens + 1):
        totals = F.log_softmax(logits.float(), dim=-1).view(batch, num_beams, -1) + sums[..., None]
        values, flat = totals.flatten(1).topk(2 * num_beams)  # (B, 2 · beams), best first
        beams, tokens = flat // totals.shape[-1], flat % totals.shape[-1]
        _collect_finished(rows, values, beams, tokens, written, width=width, length=length, end=end)
        if all(row.done for row in rows):
            return rows
        going_on = (tokens == end).long().argsort(dim=1, stable=True)[:, :num_beams]  # the best that do not end
        sums, beams, tokens = values.gather(1, going_on), beams.gather(1, going_on), tokens.gather(1, going_on)
        written = torch.cat((written.gather(1, beams[..., None].expand_as(written)), tokens[..., None]), dim=2)
        if length < max_new_tokens:
            first_beams = torch.arange(batch, device=device)[:, None] * num_beams
            cache.reorder_cache((first_beams + beams).flatten())
            logits = _next_logits(decoder, decoder.get_input_embeddings()(tokens.view(-1, 1)), cache)
    for row, row_sums, texts in zip(rows, sums.tolist(), written.tolist(), strict=True):
        if not row.done:
            for total, ids in zip(row_sums, texts, strict=True):
                row.add(total / width, ids)
    return rows


def _next_logits(decoder: PreTrainedModel, embeddings: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (rows, V) after the last of `embeddings` (rows, S, D), which are added to the cache."""
    states = decoder.base_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state
    return decoder.get_output_embeddings()(states[:, -1])


def _collect_finished(
    rows: list[Hypotheses], values: Tensor, beams: Tensor, tokens: Tensor, written: Tensor,
    *, width: int, length: int, end: int,
) -> None:  # fmt: skip
    """Finished candidates among the best `num_beams` of a row become hypotheses; others are dropped."""
    for number, row in enumerate(rows):
        if row.done:
            continue
        for rank in (tokens[number, : row.num_beams] == end).nonzero().flatten().tolist():
            ids = written[number, beams[number, rank]].tolist()
            row.add(float(values[number, rank]) / width, [*ids, end])
        row.close_if_better_than(float(values[number, 0]) / length)
