"""mPLUG-Video: a TimeSformer and a visual abstractor in front of a causal decoder (arXiv 2306.04362 section 4).

    pixels (B, C, T, H, W) -> TimeSformer (B, S, Dv) -> abstractor (B, K, Dv) -> projection (B, K, D) = visual prefix
    [prefix, embeddings of L text tokens] (B, K + L, D) -> decoder -> losses, text or features

B batch, K queries, L text tokens, D decoder width, Dv vision width, V vocabulary, E contrastive width. Padding stands
on the right and the decoder is causal, so no real token ever sees it and no attention mask is needed.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from model.mplug_video.abstractor import VisualAbstractor
from model.mplug_video.configuration import MPlugVideoConfig
from model.mplug_video.vision import Block, TimeSformer


@dataclass(frozen=True)
class VideoFeatures:
    """What the visual side makes of a batch of clips."""

    tokens: Tensor  # (B, 1 + T·N, Dv), row 0 is the class token
    queries: Tensor  # (B, K, Dv)
    prefix: Tensor  # (B, K, D)


class MPlugVideoPreTrainedModel(PreTrainedModel):
    """Construction, initial values and freezing, common to all tasks."""

    config_class = MPlugVideoConfig
    config: MPlugVideoConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_encoder = TimeSformer(config.vision_config)
        self.abstractor = VisualAbstractor(config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, text_width)
        self.visual_norm = nn.LayerNorm(text_width, eps=1e-6) if config.query_norm else nn.Identity()
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        if config.freeze_decoder:
            self.decoder.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals of 0.015 for weights and embeddings; residual outputs shrink with depth.

        temporal_fc starts at zero in every block, so that a clip is first read frame by frame.
        """
        std = self.config.vision_config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.xavier_normal_(module.bias_k)
            init.xavier_normal_(module.bias_v)
        elif isinstance(module, VisualAbstractor):
            init.trunc_normal_(module.queries, std=std)
        elif isinstance(module, TimeSformer):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.pos_embed, std=std)
            init.zeros_(module.temporal_embed)
            for depth, block in enumerate(module.blocks, start=1):
                self._init_block(block, depth, std)

    @staticmethod
    def _init_block(block: nn.Module, depth: int, std: float) -> None:
        assert isinstance(block, Block)
        for linear in (block.attn.proj, block.mlp.fc2):
            init.trunc_normal_(linear.weight, std=std / (2 * depth) ** 0.5)
        for attention in (block.attn, block.temporal_attn):
            init.zeros_(attention.q_bias)
            init.zeros_(attention.v_bias)
        init.zeros_(block.temporal_fc.weight)
        init.zeros_(block.temporal_fc.bias)

    def train(self, mode: bool = True) -> Self:
        """A frozen decoder stays in evaluation mode: its dropout would only add noise to what it cannot learn from."""
        super().train(mode)
        if self.config.freeze_decoder:
            self.decoder.eval()
        return self

    def encode_video(self, pixel_values: Tensor) -> VideoFeatures:  # (B, C, T, H, W)
        tokens = self.vision_encoder(pixel_values.to(self.dtype))
        queries = self.abstractor(tokens)
        return VideoFeatures(tokens, queries, self.visual_norm(self.visual_projection(queries)))

    def decode(self, prefix: Tensor | None, input_ids: Tensor) -> Tensor:
        """Decoder states of the text tokens, (B, L, D), after the optional visual prefix (B, K, D)."""
        embeddings = self.decoder.get_input_embeddings()(input_ids)  # (B, L, D)
        if prefix is None:
            return self.decoder.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        embeddings = torch.cat((prefix, embeddings), dim=1)  # (B, K + L, D)
        states = self.decoder.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states[:, prefix.shape[1] :]

    def token_losses(self, prefix: Tensor | None, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Cross entropies (B, L - 1) of tokens 1..L-1, zero where `loss_mask` (B, L - 1) is: fp32.

        Logits are computed only where a loss is taken: with V = 51,200 they would be the largest tensor of the step.
        """
        wanted = loss_mask.bool()
        states = self.decode(prefix, input_ids)[:, :-1]
        logits = self.decoder.get_output_embeddings()(states[wanted]).float()  # (wanted, V)
        losses = states.new_zeros(wanted.shape, dtype=torch.float32)
        return losses.masked_scatter(wanted, F.cross_entropy(logits, input_ids[:, 1:][wanted], reduction="none"))

    def text_features(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """The state of each row's last real token, (B, L, D) -> (B, D)."""
        last = attention_mask.long().sum(dim=1) - 1
        return states[torch.arange(len(states), device=states.device), last]


class MPlugVideoForConditionalGeneration(MPlugVideoPreTrainedModel):
    """Reads a clip and writes text: captioning, and pre-training without the contrastive loss."""

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Mean cross entropy per token of the batch where `loss_mask` (B, L - 1) is 1."""
        losses = self.token_losses(self.encode_video(pixel_values).prefix, input_ids, loss_mask)
        return losses.sum() / loss_mask.sum()

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, **options: Any) -> Tensor:
        """Token ids written after the clip and the prompt `input_ids` (B, L), which all rows share in length.

        `options` go to transformers' `generate` (num_beams, do_sample, max_new_tokens, …).
        """
        prompt = self.decoder.get_input_embeddings()(input_ids)
        embeddings = torch.cat((self.encode_video(pixel_values).prefix, prompt), dim=1)  # (B, K + L, D)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.decoder.generate(inputs_embeds=embeddings, attention_mask=mask, **options)


class MPlugVideoForPreTraining(MPlugVideoForConditionalGeneration):
    """Video captioning on titles, with an optional contrastive loss between queries and titles."""

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__(config)
        if config.use_contrastive:
            self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.contrastive_size)
            self.text_proj = nn.Linear(config.text_config.hidden_size, config.contrastive_size)
            self.temperature = nn.Parameter(torch.tensor([config.temperature]))  # ZeRO cannot shard a scalar
        self.post_init()

    def contrastive_features(
        self, video: VideoFeatures, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised features of the queries (B, K, E) and of the titles (B, E), read without the clip."""
        text = self.text_features(self.decode(None, input_ids), attention_mask)
        return F.normalize(self.vision_proj(video.queries), dim=-1), F.normalize(self.text_proj(text), dim=-1)


class MPlugVideoForRetrieval(MPlugVideoPreTrainedModel):
    """Dual encoder: a clip's class token and a text's last state in one space of E dimensions."""

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__(config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.contrastive_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.contrastive_size)
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))  # ZeRO cannot shard a scalar
        self.post_init()

    def embed_video(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors (B, E) of clips (B, C, T, H, W)."""
        tokens = self.vision_encoder(pixel_values.to(self.dtype))
        return F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (B, E) of texts (B, L)."""
        states = self.text_features(self.decode(None, input_ids), attention_mask)
        return F.normalize(self.text_proj(states), dim=-1)


class MPlugVideoForClassification(MPlugVideoPreTrainedModel):
    """Two ways to name a clip's category: the likelihood of each name as an answer, and a head of its own."""

    def __init__(self, config: MPlugVideoConfig) -> None:
        super().__init__(config)
        if not config.class_names:
            raise ValueError("class_names must list the categories of the classification head, it is empty.")
        width = config.text_config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(config.class_names)))
        self.post_init()

    def classify(self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Head logits (B, classes) from the state at the end of prefix + title."""
        return self.classifier(self.text_features(self.decode(prefix, input_ids), attention_mask))

    def score_answers(self, prefix: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Log likelihoods (B, classes) of the answers in `input_ids` (B, classes, L), summed over their tokens.

        Sums favour short names; so does the published evaluation, whose figures this keeps comparable.
        """
        batch, classes, _ = input_ids.shape
        repeated = prefix.repeat_interleave(classes, dim=0)  # (B · classes, K, D)
        losses = self.token_losses(repeated, input_ids.flatten(0, 1), loss_mask.flatten(0, 1))
        return -losses.sum(dim=1).view(batch, classes)
