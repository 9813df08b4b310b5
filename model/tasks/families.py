"""How models of each family are asked about clips in an evaluation.

Both read conversations: mPLUG-Owl in its format, mPLUG-Video as its visual prefix and their texts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.config.schema import RunConfig
from model.data.conversations import Conversation, media_of, text_of
from model.data.loading.loader import Batch, Example
from model.errors import DataError
from model.tasks.base import Evaluator
from model.tasks.instruction import Instruction


@dataclass
class Prompts:
    """Prompts of a batch as the decoder reads them."""

    embeddings: Tensor  # (B, S, D)
    mask: Tensor  # (B, S), zero at padding, which never comes last
    last_ids: Tensor  # (B,), the last token of each prompt


class Family(ABC):
    """How the models of a family are asked."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __getstate__(self) -> dict[str, Any]:
        """The part that loader processes receive, as of the evaluator."""
        return {name: value for name, value in self.__dict__.items() if name != "model"}

    @property
    @abstractmethod
    def decoder(self) -> Any: ...

    @abstractmethod
    def length(self, messages: Conversation) -> int:
        """Positions of the decoder that a question takes. Raises DataError if the family cannot read it."""

    @abstractmethod
    def ask(self, examples: list[Example], questions: list[Conversation]) -> Batch:
        """Token IDs (B, L) of the questions, padded on the left, with their mask, the media and the annotations."""

    @abstractmethod
    def embed(self, batch: Batch) -> Prompts:
        """The prompts of a batch that `Evaluator.normalize` has seen."""

    def texts(self, written: Tensor) -> list[str]:
        return [text.strip() for text in self.processor.batch_decode(written, skip_special_tokens=True)]


class MPlugVideoFamily(Family):
    """Visual prefix, begin token and the texts of all turns."""

    @property
    def decoder(self) -> Any:
        return self.model.decoder

    def _encode(self, messages: Conversation) -> list[int]:
        tokenizer = self.processor.tokenizer
        text = " ".join(filter(None, map(text_of, messages)))
        return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]

    def length(self, messages: Conversation) -> int:
        kinds = [kind for kind, _ in media_of(messages)]
        if kinds != ["video"]:
            raise DataError(
                "an mPLUG-Video answers questions about one video, but a conversation has "
                f"{', '.join(kinds) or 'no video'}: {text_of(messages[-1])[:200]}"
            )
        return self.model.config.num_queries + len(self._encode(messages))

    def ask(self, examples: list[Example], questions: list[Conversation]) -> Batch:
        rows = [torch.tensor(self._encode(messages)) for messages in questions]
        return {
            "frames": Evaluator.stack_frames(examples),
            "input_ids": pad_sequence(rows, True, self.processor.tokenizer.pad_token_id, "left"),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
            "annotations": [example.annotation for example in examples],
        }

    def embed(self, batch: Batch) -> Prompts:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        prefix = self.model.encode_video(batch["pixel_values"]).prefix
        embeddings = torch.cat((prefix, self.decoder.get_input_embeddings()(ids)), dim=1)
        return Prompts(embeddings, torch.cat((mask.new_ones(prefix.shape[:2]), mask), dim=1), ids[:, -1])

    def texts(self, written: Tensor) -> list[str]:
        return self.processor.captions(written)


class MplugOwlFamily(Family):
    """The format of instruction tuning."""

    def __init__(self, model: Any, processor: Any, config: RunConfig) -> None:
        super().__init__(model, processor)
        self.task = Instruction(config, model, processor)

    @property
    def decoder(self) -> Any:
        return self.model.language_model

    def length(self, messages: Conversation) -> int:
        return len(self.processor.encode_chat(messages))

    def ask(self, examples: list[Example], questions: list[Conversation]) -> Batch:
        return self.task.ask(examples, questions)

    def embed(self, batch: Batch) -> Prompts:
        ids = batch["input_ids"]
        embeddings = self.model.embed(ids, media=self.task.encode_media(self.task.normalize(batch)))
        return Prompts(embeddings, batch["attention_mask"], ids[:, -1])
