"""Trains the tiny decoder on the titles of the corpus before it is frozen. The published decoders are pre-trained.

Each title is preceded by a random selection of its own tokens, as many as the visual prefix has. A decoder that was
trained on billions of texts uses its context. One that has only read 800 titles must be taught to; otherwise a visual
prefix has no effect later (measured: none after 20,000 clips without this, a clear one after 3,000 with it).
"""

import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model import manifest, storage
from model.data.annotations import INSTRUCTION, read_annotations
from model.data.loading.loader import Batch, Example
from model.mplug_owl_video.processing import chat_text
from model.mplug_video.processing import answer_mask, clean_caption
from model.mplug_video.tokenization import encode_sentence, train_bpe_tokenizer
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.pretraining import MAX_WORDS


class LanguageModeling(Task):
    """The tokenizer is that of `model.decoder`; the decoder is built from `model.text`."""

    reads_video = False

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

    def example_batch(self, clips: int) -> Batch:
        ids = torch.ones(clips, self.config.model.num_queries + self.config.data.max_length, dtype=torch.long)
        return {"input_ids": ids, "loss_mask": ids[:, 1:]}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        rows, length = batch["input_ids"].shape
        return [DecoderPass(rows=rows, length=length, scored=int(batch["loss_mask"].sum()), after_prefix=False)]

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        ids, wanted = batch["input_ids"], batch["loss_mask"].bool()
        logits = self.model(input_ids=ids).logits[:, :-1][wanted].float()
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        return loss, {"perplexity": torch.exp(loss.detach())}


def publish_tokenizer(raw: str, root: str, vocab_size: int, dataset: str = "pretrain") -> str:
    """Trains the tokenizer of a tiny decoder on the titles of a dataset below `raw`, or on its conversations.

    Returns its URI, <root>/models/tokenizer-<dataset>/<version>.
    """
    rows = read_annotations(raw, dataset, "train")
    if dataset == INSTRUCTION:
        texts = [chat_text(row.conversation, "", add_generation_prompt=False) for row in rows]
    else:
        texts = [clean_caption(row.text, MAX_WORDS) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        train_bpe_tokenizer(texts, vocab_size).save_pretrained(folder)
        return manifest.publish_folder(
            Path(folder), storage.join(root, "models", f"tokenizer-{dataset}"), vocab_size=vocab_size
        )
