"""mPLUG-Video: a TimeSformer and a visual abstractor in front of a causal decoder (arXiv 2306.04362 section 4).

    pixels (B, C, T, H, W) -> TimeSformer (B, S, Dv) -> abstractor (B, K, Dv) -> projection (B, K, D) = visual prefix
    [prefix, embeddings of L text tokens] (B, K + L, D) -> decoder -> losses, text or features

B batch, K queries, L text tokens, D decoder width, Dv vision width, V vocabulary, E contrastive width. Padding is on
the right and the decoder is causal, so no real token attends to it, and no attention mask is needed.
"""

import re
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from model.causal_lm import ReadPrompts, Texts, without_dropout
from model.losses import losses_at
from model.mplug_video.abstractor import VisualAbstractor
from model.mplug_video.configuration import MPlugVideoConfig
from model.mplug_video.decoding import beam_search
from model.mplug_video.vision import TimeSformer

HEADS = ("vision_proj.", "text_proj.", "temperature", "classifier.")
"""Starts of the names of weights that a task adds. A model of another task has none, or others."""


@dataclass(frozen=True)
class VideoFeatures:
    """Features of a batch of clips."""

    tokens: Tensor  # (B, 1 + T·N, Dv), row 0 is the class token
    queries: Tensor  # (B, K, Dv)
    prefix: Tensor  # (B, K, D)


def compile_layers(network: nn.Module) -> None:
    """Compiles the layers of vision encoder and decoder on first use. Layers of a kind share the compiled code."""
    for module in network.modules():
        if isinstance(module, TimeSformer):
            module.compile_blocks()
        elif isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)  # for texts of any length


class MPlugVideoPreTrainedModel(PreTrainedModel):
    """Construction, initialisation and freezing, common to all tasks."""

    config_class = MPlugVideoConfig
    config: MPlugVideoConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [f"^{re.escape(head)}" for head in HEADS]

    def __init__(
        self,
        config: MPlugVideoConfig,
        *,
        vision_encoder: TimeSformer | None = None,
        decoder: PreTrainedModel | None = None,
    ) -> None:
        """A fresh network; a trained vision encoder and decoder are used if given."""
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_encoder = vision_encoder or TimeSformer(config.vision_config)
        self.abstractor = VisualAbstractor(config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, text_width)
        self.visual_norm = nn.LayerNorm(text_width, eps=1e-6) if config.query_norm else nn.Identity()
        self.decoder = decoder or AutoModelForCausalLM.from_config(decoder_config(config))
        self.abstractor_checkpointing = False
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every weight trainable. Freezes weights again as configured."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def freeze(self) -> None:
        """Disables gradients of the parts that the configuration does not train."""
        if self.config.freeze_decoder:
            self.decoder.requires_grad_(False)
        if self.config.freeze_vision:
            for name, parameter in self.vision_encoder.named_parameters():
                parameter.requires_grad_("temporal" in name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals (std 0.015) for weights and queries. Vision encoder and decoder initialise themselves."""
        std = self.config.vision_config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
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

    def checkpoint_activations(self, parts: Collection[str]) -> None:
        """Recomputes activations in the backward pass of "vision", "abstractor", "decoder": slower, less memory."""
        self.vision_encoder.checkpoint_activations = "vision" in parts
        self.abstractor_checkpointing = "abstractor" in parts
        if "decoder" in parts:
            self.decoder.activation_checkpointing_enable()
        else:
            self.decoder.activation_checkpointing_disable()

    def encode_video(self, pixel_values: Tensor) -> VideoFeatures:  # (B, C, T, H, W)
        tokens = self.vision_encoder(pixel_values.to(self.dtype))
        if self.abstractor_checkpointing and self.training:
            queries = checkpoint(self.abstractor, tokens, use_reentrant=False)
        else:
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
        """Cross entropies (B, L - 1) of tokens 1..L-1 after an optional prefix (B, K, D), fp32. See `losses_of`."""
        return self.losses_of(self.decode(prefix, input_ids), input_ids, loss_mask)

    def losses_of(self, states: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Cross entropies (B, L - 1) of tokens 1..L-1 from states (B, L, D), where `loss_mask` (B, L - 1) is one."""
        return losses_at(states, self.decoder.get_output_embeddings(), input_ids, loss_mask)

    def read_prefixes(self, prefix: Tensor) -> ReadPrompts:
        """Visual prefixes (B, K, D) in the decoder's cache."""
        return ReadPrompts(self.decoder, prefix)

    def score_answers(self, prefixes: ReadPrompts, texts: Texts, starts: Sequence[Sequence[int]]) -> Tensor:
        """Log likelihoods (B, N) of N texts for each clip, over the tokens of the answers, from number `starts` on.

        Sums favour short answers, as does the published evaluation (see `mean_answer_scores`).
        """
        scores = prefixes.log_likelihoods(texts, starts)
        if not self.config.mean_answer_scores:
            return scores
        lengths = [
            [len(text) - start for text, start in zip(*own, strict=True)] for own in zip(texts, starts, strict=True)
        ]
        return scores / torch.tensor(lengths, device=scores.device)

    def text_features(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """The state of each row's last real token, (B, L, D) -> (B, D)."""
        last = attention_mask.long().sum(dim=1) - 1
        return states[torch.arange(len(states), device=states.device), last]


class MPlugVideoForConditionalGeneration(MPlugVideoPreTrainedModel):
    """Generates text for a clip: captioning, and pre-training without the contrastive loss."""

    def __init__(self, config: MPlugVideoConfig, **trained: PreTrainedModel) -> None:
        super().__init__(config, **trained)
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Mean cross entropy per token of the batch where `loss_mask` (B, L - 1) is 1."""
        losses = self.token_losses(self.encode_video(pixel_values).prefix, input_ids, loss_mask)
        return losses.sum() / loss_mask.sum()

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, max_new_tokens: int = 100, **options: Any) -> Tensor:
        """Token IDs (B, new) that follow clips (B, C, T, H, W) and prompts (B, L) of equal length.

        `options` are passed to `generate` of transformers (num_beams, do_sample, top_p, …). Each row ends with the end
        token, then padding.
        """
        prefix = self.encode_video(pixel_values).prefix
        embeddings = torch.cat((prefix, self.decoder.get_input_embeddings()(input_ids)), dim=1)  # (B, K + L, D)
        num_beams, text = options.get("num_beams", 1), self.config.text_config
        if not self.config.released_beam_search or num_beams == 1 or options.get("do_sample"):
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            return self.decoder.generate(
                inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=max_new_tokens, **options
            )
        if foreign := options.keys() - {"num_beams", "do_sample"}:
            raise ValueError(
                f"released_beam_search takes no {', '.join(sorted(foreign))}. Set it to False to use them."
            )
        found = beam_search(
            self.decoder,
            embeddings,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            width=input_ids.shape[1] + max_new_tokens,
            end=text.eos_token_id,
        )
        texts = [torch.tensor(row.found[0][1], device=embeddings.device) for row in found]
        return pad_sequence(texts, batch_first=True, padding_value=text.pad_token_id)


class MPlugVideoForPreTraining(MPlugVideoForConditionalGeneration):
    """Video captioning on titles, with an optional contrastive loss between queries and titles."""

    def __init__(self, config: MPlugVideoConfig, **trained: PreTrainedModel) -> None:
        super().__init__(config, **trained)
        if config.use_contrastive:
            self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.contrastive_size)
            self.text_proj = nn.Linear(config.text_config.hidden_size, config.contrastive_size)
            self.temperature = nn.Parameter(torch.tensor([config.temperature]))  # ZeRO cannot shard a scalar
        self.post_init()

    def contrastive_features(
        self, video: VideoFeatures, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised features of the queries (B, K, E), and of the titles without the clip (B, E)."""
        text = self.text_features(self.decode(None, input_ids), attention_mask)
        return F.normalize(self.vision_proj(video.queries), dim=-1), F.normalize(self.text_proj(text), dim=-1)


class MPlugVideoForRetrieval(MPlugVideoPreTrainedModel):
    """Dual encoder: the class token of a clip and the last state of a text in a common space of E dimensions."""

    def __init__(self, config: MPlugVideoConfig, **trained: PreTrainedModel) -> None:
        super().__init__(config, **trained)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.contrastive_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.contrastive_size)
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))  # ZeRO cannot shard a scalar
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of clips and of texts."""
        return self.embed_video(pixel_values), self.embed_text(input_ids, attention_mask)

    def embed_video(self, pixel_values: Tensor) -> Tensor:
        """Unit vectors (B, E) of clips (B, C, T, H, W)."""
        tokens = self.vision_encoder(pixel_values.to(self.dtype))
        return F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def embed_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors (B, E) of texts (B, L)."""
        states = self.text_features(self.decode(None, input_ids), attention_mask)
        return F.normalize(self.text_proj(states), dim=-1)


class MPlugVideoForClassification(MPlugVideoPreTrainedModel):
    """Classifies a clip in two ways: by the likelihood of each class name as an answer, and by a classification head.

    With the classes 否 and 是 it is the matching variant of retrieval: whether a clip and a title belong together.
    """

    def __init__(self, config: MPlugVideoConfig, **trained: PreTrainedModel) -> None:
        super().__init__(config, **trained)
        if not config.class_names:
            raise ValueError("class_names must list the categories of the classification head, but it is empty.")
        width = config.text_config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(config.class_names)))
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Head logits (B, classes) of clips (B, C, T, H, W) with their titles (B, L)."""
        return self.classify(self.encode_video(pixel_values).prefix, input_ids, attention_mask)

    def classify(self, prefix: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Head logits (B, classes) from the state at the end of prefix + title."""
        return self.classifier(self.text_features(self.decode(prefix, input_ids), attention_mask))

    def classify_texts(self, prefixes: ReadPrompts, texts: Texts) -> Tensor:
        """Head logits (B, N, classes) of N titles for each clip."""
        return self.classifier(prefixes.last_states(texts))


def decoder_config(config: MPlugVideoConfig) -> PreTrainedConfig:
    """The configuration of the decoder. A frozen decoder has no dropout unless `decoder_dropout` is set."""
    text_config = deepcopy(config.text_config)
    if config.freeze_decoder and not config.decoder_dropout:
        without_dropout(text_config)
    return text_config
