"""The visual abstractor: learned queries attend to all tokens of a clip or an image, (B, S, D) -> (B, K + 1, H).

B batch, S visual tokens, R query rows (K for an image, 2·K for a clip), D width, H decoder width. Layout and names of
weights are those of mPLUG-Owl's video model (arXiv 2304.14178 section 3.1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from model.layers import Apply, Linear, attention_output, keep_intermediate, recompute_intermediate
from model.mplug_owl_video.configuration import MplugOwlVisualAbstractorConfig
from model.mplug_owl_video.vision import init_layer

EPS = 1e-5
"""Of the norms around the attention; `layer_norm_eps` is that of the norm within the MLP."""


class GatedMLP(nn.Module):
    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.mlp_size
        self.w1 = Linear(width, hidden)
        self.w2 = Linear(hidden, width)
        self.w3 = Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, apply: Apply) -> Tensor:
        return apply(self.w2, self._gated, self.w1(x), self.w3(x))

    def _gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return self.ffn_ln(F.silu(gate) * x)


class Projections(nn.Module):
    """Queries, keys and values of the attention."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.encoder_hidden_size, config.hidden_size)
        self.value = Linear(config.encoder_hidden_size, config.hidden_size)


class Output(nn.Module):
    """Everything behind the attention."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.out_proj = Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.mlp = GatedMLP(config)


class CrossAttention(nn.Module):
    """Queries attend to themselves and to the visual tokens, then an MLP."""

    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.normk = nn.LayerNorm(config.encoder_hidden_size, eps=EPS)
        self.attention = Projections(config)
        self.output = Output(config)

    def forward(self, queries: Tensor, tokens: Tensor, apply: Apply) -> Tensor:  # (B, R, D), (B, S, D)
        queries = self.norm1(queries)
        context = torch.cat((queries, self.normk(tokens)), dim=1)  # (B, R + S, D)
        q, k, v = map(
            self._heads, (self.attention.query(queries), self.attention.key(context), self.attention.value(context))
        )
        attended = attention_output(q, k, v, self.dropout if self.training else 0.0)
        # the residual connection uses the normalised queries, which the published weights depend on
        x = queries + self.output.out_proj(attended.transpose(1, 2).flatten(2))
        return x + self.output.mlp(self.output.norm2(x), apply)

    def _heads(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, M, S, D / M)
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class AbstractorLayer(nn.Module):
    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config)

    def forward(self, queries: Tensor, tokens: Tensor, apply: Apply) -> Tensor:
        return self.crossattention(queries, tokens, apply)


class AbstractorEncoder(nn.Module):
    def __init__(self, config: MplugOwlVisualAbstractorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AbstractorLayer(config) for _ in range(config.num_hidden_layers))


class MplugOwlVisualAbstractorModel(PreTrainedModel):
    """Reduces a clip or an image to K vectors of the decoder's width, followed by a learned end vector."""

    config_class = MplugOwlVisualAbstractorConfig
    config: MplugOwlVisualAbstractorConfig
    main_input_name = "tokens"
    _supports_sdpa = True

    def __init__(self, config: MplugOwlVisualAbstractorConfig, text_width: int) -> None:
        super().__init__(config)
        self.encoder = AbstractorEncoder(config)
        self.visual_fc = Linear(config.hidden_size, text_width)
        self.temporal_visual_fc = Linear(config.hidden_size, text_width)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, text_width))
        self.post_init()

    def forward(self, tokens: Tensor, queries: Tensor, temporal_queries: Tensor | None = None) -> Tensor:
        """Vectors (B, K + 1, H) of visual tokens (B, S, D), with queries (1, K, D) each; temporal ones for clips."""
        num_queries = queries.shape[1]
        if temporal_queries is not None:
            queries = torch.cat((queries, temporal_queries), dim=1)
        x = queries.to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, R, D)
        for layer in self.encoder.layers:
            x = layer(x, tokens, recompute_intermediate if torch.is_grad_enabled() else keep_intermediate)
        vectors = self.visual_fc(x[:, :num_queries])  # (B, K, H)
        if temporal_queries is not None:
            vectors = vectors + self.temporal_visual_fc(x[:, num_queries:])
        return torch.cat((vectors, self.vit_eos.expand(len(vectors), -1, -1)), dim=1)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normals (std 0.02)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.LayerNorm):
            init_layer(module, std)
        elif isinstance(module, MplugOwlVisualAbstractorModel):
            init.trunc_normal_(module.vit_eos, std=std)
