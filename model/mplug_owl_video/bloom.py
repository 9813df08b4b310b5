"""A Bloom decoder as the original code uses it, and faster: its norm of word embeddings, attention and activation."""

from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention


class LookupLayerNorm(nn.LayerNorm):
    """Bloom's norm of word embeddings, applied when they are looked up.

    transformers applies it to everything that enters the decoder. The published weights were trained with media vectors
    that are not normalised.
    """

    def forward(self, embeddings: Tensor, *, is_lookup: bool = False) -> Tensor:
        return super().forward(embeddings) if is_lookup else embeddings

    def after_lookup(self, _lookup: nn.Module, _inputs: Any, embeddings: Tensor) -> Tensor:
        return self(embeddings, is_lookup=True)


class SharedBias:
    """The sum of ALiBi and mask, (B, M, L, S), which is the same in all layers: one tensor as long as one is in use."""

    def __init__(self) -> None:
        self.last: list[ReferenceType[Tensor]] = []

    def of(self, alibi: Tensor, mask: Tensor, batch: int) -> Tensor:
        """From ALiBi (B · M, 1, S) and an additive mask (B or 1, 1, L, S)."""
        known = [reference() for reference in self.last]
        if known and known[0] is alibi and known[1] is mask and known[2] is not None:
            return known[2]
        bias = alibi.view(batch, -1, 1, alibi.shape[-1]) + mask
        self.last = [ref(alibi), ref(mask), ref(bias)]
        return bias


class FusedBloomAttention(BloomAttention):
    """Attention by torch's fused kernels, which keep no scores (B, M, L, S) for the backward pass.

    B batch, M heads, L queries, S keys, D head width.
    """

    shared: SharedBias

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = self._reshape(self.query_key_value(hidden_states))  # (B, M, L, D) each
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias = self.shared.of(alibi, attention_mask, len(q))
        dropout = self.attention_dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=self.inv_norm_factor)
        output = self.dense(attended.transpose(1, 2).flatten(2))
        return residual + F.dropout(output, self.hidden_dropout, self.training), None


def prepare_bloom(bloom: PreTrainedModel) -> None:
    """Replaces the norm of word embeddings, the attention and the activation of a Bloom decoder. No weight changes."""
    transformer, config = bloom.transformer, bloom.config
    norm = LookupLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
    transformer.word_embeddings_layernorm = norm
    transformer.word_embeddings.register_forward_hook(norm.after_lookup)
    config._attn_implementation = "eager"  # else transformers may make no mask, or one that cannot be added
    shared = SharedBias()
    for block in transformer.h:
        block.self_attention.__class__ = FusedBloomAttention
        block.self_attention.shared = shared
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")
