"""mPLUG-Video (BloomZ-7B): the video model of mPLUG-Owl with any causal decoder (arXiv 2306.04362 section 4.3).

    pixels (n, C, T, H, W) -> vision model (n, T, 1 + N, D) -> abstractor (n, K + 1, H) = media vectors
    token IDs (B, L), with runs of K + 1 negative IDs for media -> embeddings (B, L, H) -> decoder -> logits (B, L, V)

B batch, L positions, n clips or images of the batch, K queries, H decoder width, V vocabulary. Media are taken in
reading order: the first run of video IDs in the batch is the first clip, and so on; images have a count of their own.
"""

from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.causal_lm import room_for
from model.layers import use_linear
from model.losses import losses_at
from model.mplug_owl_video.abstractor import MplugOwlVisualAbstractorModel
from model.mplug_owl_video.bloom import prepare_bloom
from model.mplug_owl_video.configuration import IMAGE_ID, VIDEO_ID, MplugOwlConfig
from model.mplug_owl_video.vision import MplugOwlVisionModel


class MplugOwlForConditionalGeneration(PreTrainedModel):
    """Continues conversations about videos and images."""

    config_class = MplugOwlConfig
    config: MplugOwlConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["VisionLayer", "AbstractorLayer", "BloomBlock", "LlamaDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # buffers in files of transformers 4

    def __init__(self, config: MplugOwlConfig, *, language_model: PreTrainedModel | None = None) -> None:
        """A fresh network; a trained decoder is used if given."""
        super().__init__(config)
        width = config.visual_abstractor_config.hidden_size
        self.vision_model = MplugOwlVisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.temporal_query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.abstractor = MplugOwlVisualAbstractorModel(config.visual_abstractor_config, config.text_config.hidden_size)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        use_linear(self.language_model)
        self.abstractor_checkpointing = False
        if config.text_config.model_type == "bloom":
            prepare_bloom(self.language_model)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing or unexpected weight is an error, where transformers initialises it."""
        with_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f"{name} is {kind}" for kind in ("missing", "unexpected") for name in sorted(report[f"{kind}_keys"])]
        wrong += [f"{name} has another shape" for name, *_ in sorted(report["mismatched_keys"])]
        if wrong:
            raise ValueError(f"{args[0]} must hold the weights of its config.json: {wrong[0]} ({len(wrong)} in all).")
        return (model, report) if with_report else model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.get_output_embeddings()

    def train(self, mode: bool = True) -> Self:
        """As in torch, but a part without trained weights keeps no dropout."""
        super().train(mode)
        for part in (self.vision_model, self.abstractor, self.language_model):
            if not any(weights.requires_grad for weights in part.parameters()):
                part.eval()
        return self

    def encode_media(self, pixel_values: Tensor) -> Tensor:
        """Vectors (n, K + 1, H) of clips (n, C, T, H, W) or images (n, C, H, W). A clip of one frame is an image."""
        trained = torch.is_grad_enabled() and any(weights.requires_grad for weights in self.vision_model.parameters())
        with torch.set_grad_enabled(trained):
            tokens = self.vision_model(pixel_values)  # (n, T, 1 + N, D)
        temporal_queries = self.temporal_query_tokens if tokens.shape[1] > 1 else None
        given = tokens.flatten(1, 2), self.query_tokens, temporal_queries
        if self.abstractor_checkpointing and self.training:
            return checkpoint(self.abstractor, *given, use_reentrant=False)
        return self.abstractor(*given)

    def checkpoint_activations(self, parts: Collection[str]) -> None:
        """Recomputes activations in the backward pass of "vision", "abstractor", "decoder": slower, less memory."""
        self.vision_model.encoder.checkpoint_activations = "vision" in parts
        self.abstractor_checkpointing = "abstractor" in parts
        if "decoder" in parts:
            self.language_model.activation_checkpointing_enable()
        else:
            self.language_model.activation_checkpointing_disable()

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        video_pixel_values: Tensor | None = None,
        media: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings (B, L, H) of token IDs (B, L), with media vectors in the runs of negative IDs.

        `media` holds vectors that are already encoded, by ID. Raises ValueError unless every run has its medium.
        """
        media = dict(media or {})
        for media_id, pixels in ((IMAGE_ID, pixel_values), (VIDEO_ID, video_pixel_values)):
            if pixels is not None:
                media[media_id] = self.encode_media(pixels)
        embeddings = self.get_input_embeddings()(input_ids.clamp(min=0))
        for media_id, name in ((IMAGE_ID, "images"), (VIDEO_ID, "videos")):
            places = input_ids == media_id
            vectors = media.get(media_id, embeddings.new_empty(0, self.config.media_length, embeddings.shape[-1]))
            if places.sum() != vectors.shape[:2].numel():
                raise ValueError(
                    f"input_ids must have {self.config.media_length} positions for each of the {len(vectors)} {name}, "
                    f"but it has {int(places.sum())}. The processor makes both."
                )
            embeddings = embeddings.masked_scatter(places[..., None], vectors.to(embeddings))
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        video_pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), and the mean cross entropy of the labels (B, L) that are not -100, shifted by one."""
        embeddings = self.embed(input_ids, pixel_values, video_pixel_values)
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=_whole(attention_mask), labels=labels, **kwargs
        )

    def token_losses(self, input_ids: Tensor, loss_mask: Tensor, media: dict[int, Tensor]) -> Tensor:
        """Cross entropies (B, L - 1) in fp32 of tokens 1..L-1 where `loss_mask` (B, L - 1) is one, zero elsewhere.

        Rows are padded on the right, which needs no attention mask. `media` holds encoded media by ID.
        """
        decoder = self.language_model.base_model
        states = decoder(inputs_embeds=self.embed(input_ids, media=media), use_cache=False).last_hidden_state
        return losses_at(states, self.get_output_embeddings(), input_ids, loss_mask)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        video_pixel_values: Tensor | None = None,
        media: dict[int, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Token IDs (B, new) that follow prompts (B, L), padded on the left if their lengths differ.

        `options` are those of `generate` of transformers. `max_length` counts the begin token and the new tokens, not
        the prompt, as in the original code.
        """
        if (longest := options.pop("max_length", None)) is not None:
            options.setdefault("max_new_tokens", longest - 1)
        if "max_new_tokens" in options:
            options["max_new_tokens"] = room_for(self.config.text_config, input_ids.shape[1], options["max_new_tokens"])
        embeddings = self.embed(input_ids, pixel_values, video_pixel_values, media)
        mask = torch.ones_like(input_ids) if attention_mask is None else _whole(attention_mask)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normals (std 0.02) for the queries: equal ones, as in the original code, would stay equal.

        Vision model, abstractor and decoder initialise themselves.
        """
        if isinstance(module, MplugOwlForConditionalGeneration):
            for queries in (module.query_tokens, module.temporal_query_tokens):
                init.trunc_normal_(queries, std=self.config.visual_abstractor_config.initializer_range)


def _whole(mask: Tensor | None) -> Tensor | None:
    """An attention mask of integers; that of the original processor has floats, which callers cast with the pixels."""
    return None if mask is None else mask.long()
