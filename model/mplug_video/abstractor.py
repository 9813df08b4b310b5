"""The visual abstractor: K learned queries attend to a clip, tokens (B, S, D) -> (B, K, D).

One attention-pooling layer (arXiv 2306.04362 section 4.1). B batch, S visual tokens, K queries, D width.
"""

import torch
from torch import Tensor, nn

from model.layers import keep_intermediate
from model.mplug_video.configuration import MPlugVideoConfig
from model.mplug_video.vision import MLP


class VisualAbstractor(nn.Module):
    """Cross-attention from learned queries to all visual tokens, including the class token."""

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__()
        vision = config.vision_config
        width, eps = vision.hidden_size, vision.layer_norm_eps
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, width))
        self.norm_queries = nn.LayerNorm(width, eps=eps)
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        # add_bias_kv: one additional learned key and value, as in the released weights
        self.attn = nn.MultiheadAttention(width, vision.num_attention_heads, add_bias_kv=True, batch_first=True)
        self.norm_mlp = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(vision)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, S, D)
        # the residual connection uses the normalised queries, which the released weights depend on
        x = self.norm_queries(self.queries).expand(tokens.shape[0], -1, -1)  # (B, K, D)
        tokens = self.norm_tokens(tokens)
        x = x + self.attn(x, tokens, tokens, need_weights=False)[0]
        return x + self.mlp(self.norm_mlp(x), keep_intermediate)
