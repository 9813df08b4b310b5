"""Instruction tuning: trains on the answers of conversations about videos and images, and answers their last question.

The network is that of mPLUG-Owl (mPLUG-Video with BloomZ, arXiv 2306.04362 section 4.3).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from model.data.annotations import Annotation
from model.data.conversations import Conversation, media_of, text_of
from model.data.loading.loader import Batch, Example
from model.errors import DataError
from model.mplug_owl_video.configuration import MEDIA_IDS
from model.tasks import metrics
from model.tasks.base import DecoderPass, Logs, Task, VisionPass
from model.tasks.caption_metrics import rouge_l
from model.tasks.metrics import Measures, Prediction, Predictions, Scores

ANSWER_MARGIN = 2
"""An answer is cut when it is this many times as long as the longest reference of its split, in tokens."""
MEDIA = {"videos": MEDIA_IDS["video"], "images": MEDIA_IDS["image"]}
"""Fields of a batch, uint8 (n, T, H, W, C), and the token IDs in their places."""


ANSWER_PROTOCOL = {"right": "equal but for case, spaces around it and final punctuation"}


class Instruction(Task):
    architecture = "MplugOwlForConditionalGeneration"
    metrics = ("accuracy", "rouge_l")
    headline = "accuracy"

    @property
    def protocol(self) -> dict[str, str]:
        decoding = f"greedy, at most {self.max_new_tokens} tokens"
        return {"question": "the last one of a conversation", "decoding": decoding, **ANSWER_PROTOCOL}

    def collate(self, examples: list[Example]) -> Batch:
        rows, masks, media = [], [], []
        for example in examples:
            ids, are_answers = self.processor.encode_answers(
                example.annotation.conversation, self.config.data.max_length
            )
            if not any(are_answers):
                raise DataError(
                    f"a conversation must have an answer within data.max_length = {self.config.data.max_length} "
                    f"tokens, but this one has none: {example.annotation.text[:200]}"
                )
            rows.append(torch.tensor(ids))
            masks.append(torch.tensor(are_answers[1:]).long())
            kept = sum(number < 0 for number in ids) // self.processor.media_length  # a cut row loses its last media
            media += _with_kinds(example.annotation.conversation, example)[:kept]
        pad = self.processor.tokenizer.pad_token_id or 0
        ids, mask = pad_sequence(rows, True, pad), pad_sequence(masks, True)
        return {"input_ids": ids, "loss_mask": mask, **self._stacked(media)}

    def save(self, folder: Path) -> None:
        """Writes the model with merged weights, and its adapter if only that was trained."""
        settings = self.config.model
        if not settings.lora.rank:
            super().save(folder)
            return
        from model.mplug_owl_video import lora  # loader processes import this file, and need no networks

        self.model.save_pretrained(folder, state_dict=lora.merged_weights(self.model))
        self.processor.save_pretrained(folder)
        if settings.freeze_vision and settings.freeze_abstractor:
            lora.save_adapter(self.model, settings.init_from, folder)

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        return self.ask(examples, [example.annotation.conversation[:-1] for example in examples])

    def ask(self, examples: list[Example], questions: list[Conversation]) -> Batch:
        """Evaluation batch of the examples, with a conversation for each that the model continues."""
        inputs = self.processor.pad([self.processor.encode_chat(messages) for messages in questions])
        media = [
            medium
            for example, messages in zip(examples, questions, strict=True)
            for medium in _with_kinds(messages, example)
        ]
        return {**inputs, **self._stacked(media), "annotations": [example.annotation for example in examples]}

    def example_batch(self, clips: int) -> Batch:
        ids = torch.zeros(clips, self.config.data.max_length, dtype=torch.long)
        ids[:, : self.config.model.num_queries + 1] = MEDIA["videos"]
        frames = self.example_frames(clips)
        return {"input_ids": ids, "loss_mask": (ids[:, 1:] >= 0).long(), "videos": frames, "images": frames[:0, :1]}

    def normalize(self, batch: Batch) -> Batch:
        return {**batch, **{name: self.processor.normalize(batch[name]) for name in MEDIA}}

    def vision_passes(self, batch: Batch) -> list[VisionPass]:
        return [VisionPass(clips=len(batch[name]), frames=batch[name].shape[1]) for name in MEDIA]

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        rows, length = batch["input_ids"].shape
        return [DecoderPass(rows=rows, length=length, scored=int(batch["loss_mask"].sum()))]

    def read_split(self, annotations: list[Annotation]) -> None:
        """Sets the longest answer from the references."""
        references = [text_of(annotation.conversation[-1]) for annotation in annotations]
        self.max_new_tokens = longest_answer(self.processor.tokenizer, references)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        mask, media = batch["loss_mask"], self.encode_media(batch)
        losses = self.model.token_losses(batch["input_ids"], mask, media)
        return losses.sum() / mask.sum(), {}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        written = self.model.generate(
            batch["input_ids"],
            batch["attention_mask"],
            media=self.encode_media(batch),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        answers = self.processor.batch_decode(written, skip_special_tokens=True)
        return [answered(row, answer.strip()) for row, answer in zip(batch["annotations"], answers, strict=True)]

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """Whether an answer equals the reference, of all questions and of each type; ROUGE-L of characters.

        An empty answer is wrong.
        """
        candidates = [list(row["prediction"]) for row in predictions]
        rouge = rouge_l(candidates, [[list(row["references"][0])] for row in predictions])
        return {**_by_type(predictions, list(map(_is_right, predictions))), "rouge_l": rouge}

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """The accuracy of always giving the most frequent answer of the question's type."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in predictions:
            counts[row["question_type"]][_plain(row["references"][0])] += 1
        usual = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
        rights = [usual[row["question_type"]] == _plain(row["references"][0]) for row in predictions]
        return metrics.score(_by_type(predictions, rights))

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return [(f"{row['question']} {row['prediction']}", row["references"][0]) for row in predictions]

    def _stacked(self, media: list[tuple[str, Tensor]]) -> Batch:
        """The videos and images of a batch, (0, T, H, W, C) if it has none."""
        size = self.processor.image_size
        found = {}
        for name, frames in (("videos", self.processor.num_frames), ("images", 1)):
            none = torch.empty(0, frames, size, size, 3, dtype=torch.uint8)
            own = [medium[None] for kind, medium in media if f"{kind}s" == name]
            found[name] = torch.cat([none, *own])
        return found

    def encode_media(self, batch: Batch) -> dict[int, Tensor]:
        """Vectors of the media of a batch with pixels, by their token ID.

        All processes must use the same weights: those that are trained, and under ZeRO-3 all of them. A batch without
        videos, which use all weights of the visual side, encodes a blank one.
        """
        is_partitioned = self.config.training.zero_stage == 3
        settings = self.config.model
        is_trained = torch.is_grad_enabled() and not (settings.freeze_vision and settings.freeze_abstractor)
        vectors = {}
        for name, number in MEDIA.items():
            pixels = batch[name]
            if len(pixels):
                vectors[number] = self.model.encode_media(pixels)
            elif is_partitioned or (is_trained and name == "videos"):
                vectors[number] = self.model.encode_media(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        return vectors


def answered(annotation: Annotation, answer: str) -> Prediction:
    """The prediction for the last question of a conversation."""
    question, reference = annotation.conversation[-2:]
    return {
        "video": annotation.video,
        "question": text_of(question),
        "question_type": annotation.label,
        "prediction": answer,
        "references": [text_of(reference)],
    }


def longest_answer(tokenizer: PreTrainedTokenizerBase, references: list[str]) -> int:
    """Number of tokens after which an answer is cut, for a split with these references."""
    lengths = map(len, tokenizer(references, add_special_tokens=False).input_ids)
    return ANSWER_MARGIN * (1 + max(lengths))  # 1 for the end token


def _with_kinds(messages: Conversation, example: Example) -> list[tuple[str, Tensor]]:
    """The media of a conversation with their kinds, "video" or "image"."""
    return list(zip([kind for kind, _ in media_of(messages)], example.media, strict=True))


def _plain(answer: str) -> str:
    """An answer without spaces around it, case and final punctuation."""
    return answer.strip().rstrip("。.！!").casefold()


def _is_right(row: Prediction) -> bool:
    answer = _plain(row["prediction"])
    return bool(answer) and answer == _plain(row["references"][0])


def _by_type(predictions: Predictions, rights: Sequence[bool]) -> Measures:
    """Whether answers are right, of all questions and of each type."""
    found = {"accuracy": np.array(rights, dtype=float)}
    for kind in dict.fromkeys(row["question_type"] for row in predictions if row["question_type"]):
        found[f"accuracy_{kind}"] = np.where([row["question_type"] == kind for row in predictions], rights, np.nan)
    return found
