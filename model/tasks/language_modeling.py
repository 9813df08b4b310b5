"""Teaches the tiny decoder the corpus's language before it is frozen. The published decoders come pre-trained.

Each title follows as many of its own tokens, in random order, as the visual prefix will have. A decoder that has read
billions of texts uses what stands before; one that has read 800 titles must be shown that it is worth it, or no visual
prefix can steer it later (measured: without, a clip tells it nothing after 20,000 clips; with, after 3,000).
"""

import random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from model import manifest
from model.data.loading.loader import Batch, Example
from model.errors import ConfigError
from model.mplug_video.processing import MPlugVideoProcessor, answer_mask, clean_caption
from model.mplug_video.tokenization import encode_sentence
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.pretraining import MAX_WORDS


class LanguageModeling(Task):
    """`model.decoder` names the tokenizer; the decoder itself is built from `model.text`."""

    reads_video = False

    def build(self) -> tuple[PreTrainedModel, MPlugVideoProcessor]:
        tokenizer = AutoTokenizer.from_pretrained(manifest.fetch_folder(self.config.model.decoder))
        text = dict(self.config.model.text)
        config = AutoConfig.for_model(
            text.pop("model_type"),
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        )
        known = config.to_dict().keys() | config.attribute_map.keys()
        if unknown := sorted(text.keys() - known):
            raise ConfigError(f"model.text has keys that {config.model_type} does not know: {', '.join(unknown)}.")
        self.validate_length(self.config.model.num_queries, config)
        return AutoModelForCausalLM.from_config(config), MPlugVideoProcessor(tokenizer, image_size=0, num_frames=0)

    def collate(self, examples: list[Example]) -> Batch:
        tokenizer, length = self.processor.tokenizer, self.config.data.max_length
        hints = self.config.model.num_queries
        rows = []
        for example in examples:
            sentence = encode_sentence(tokenizer, clean_caption(example.annotation.text, MAX_WORDS), length)
            rng = random.Random(example.seed)
            rows.append([rng.choice(sentence[1:-1] or sentence) for _ in range(hints)] + sentence)
        ids, mask = self.processor.pad(rows)
        return {"input_ids": ids, "loss_mask": answer_mask(mask, [hints] * len(rows))}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        rows, length = batch["input_ids"].shape
        return [DecoderPass(rows=rows, length=length, scored=int(batch["loss_mask"].sum()), after_prefix=False)]

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        ids, wanted = batch["input_ids"], batch["loss_mask"].bool()
        logits = self.model(input_ids=ids).logits[:, :-1][wanted].float()
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        return loss, {"perplexity": torch.exp(loss.detach())}
