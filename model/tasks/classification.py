"""Category prediction: the likelihood of each category's name as an answer, and a classification head."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.data.loading.loader import Batch, Example
from model.errors import DataError
from model.mplug_video.modeling import MPlugVideoForClassification
from model.mplug_video.processing import clean_caption
from model.tasks.base import DecoderPass, Logs, Prediction, Task

PROMPT = "视频标题：{} 视频类目："  # the released models were trained on this wording
PROMPT_RESERVE = 15  # characters of a title that make room for the prompt's own words
MAX_WORDS = 80


class Classification(Task):
    model_class = MPlugVideoForClassification

    def head_settings(self) -> dict[str, Any]:
        return {"class_names": self.class_names()}

    def _question(self, example: Example) -> str:
        title = clean_caption(example.annotation.text, MAX_WORDS)
        return PROMPT.format(title[: self.config.data.max_length - PROMPT_RESERVE])

    def _encode(self, examples: list[Example]) -> tuple[Batch, list[int]]:
        names = self.categories
        unknown = {example.annotation.label for example in examples} - set(names)
        if unknown:
            raise DataError(f"label must be one of the {len(names)} class names, got {sorted(unknown)}.")
        titles, mask = self.encode_texts(examples, MAX_WORDS)
        labels = [names.index(example.annotation.label) for example in examples]
        batch = {"pixel_values": self.pixel_values(examples), "title_ids": titles, "title_mask": mask}
        return batch, labels

    def collate(self, examples: list[Example]) -> Batch:
        batch, labels = self._encode(examples)
        pairs = [(self._question(item), item.annotation.label) for item in examples]
        ids, loss_mask = self.processor.pairs(pairs, self.config.data.max_length)
        return {**batch, "labels": torch.tensor(labels), "input_ids": ids, "loss_mask": loss_mask}

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        batch, _ = self._encode(examples)
        names = self.categories
        pairs = [(self._question(item), name) for item in examples for name in names]
        ids, loss_mask = self.processor.pairs(pairs, self.config.data.max_length)
        shape = (len(examples), len(names), -1)
        return {
            **batch,
            "answer_ids": ids.view(shape),
            "answer_mask": loss_mask.view(shape),
            "annotations": [example.annotation for example in examples],
        }

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        return answer_and_head_passes(self, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        return answer_and_head_loss(self.model, self.model.encode_video(batch["pixel_values"]).prefix, batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        prefix = self.model.encode_video(batch["pixel_values"]).prefix
        head = self.model.classify(prefix, batch["title_ids"], batch["title_mask"])
        names = self.categories
        predictions = []
        for row, annotation in enumerate(batch["annotations"]):
            answers = batch["answer_ids"][row], batch["answer_mask"][row]
            predictions.append({
                "video": annotation.video,
                "text": annotation.text,
                "label": annotation.label,
                "prediction": names[int(head[row].argmax())],
                "generation_scores": self.model.score_answers(prefix[row, None], *answers).float().tolist(),
                "head_scores": head[row].float().tolist(),
            })  # fmt: skip
        return predictions


def answer_and_head_loss(model: MPlugVideoForClassification, prefix: Tensor, batch: Batch) -> tuple[Tensor, Logs]:
    """The loss of the right answer's tokens, and of the head on prefix + title alone (a second pass)."""
    mask = batch["loss_mask"]
    generation = model.token_losses(prefix, batch["input_ids"], mask).sum() / mask.sum()
    logits = model.classify(prefix, batch["title_ids"], batch["title_mask"]).float()
    head = F.cross_entropy(logits, batch["labels"])
    return generation + head, {"loss_generation": generation.detach(), "loss_head": head.detach()}


def answer_and_head_passes(task: Task, batch: Batch) -> list[DecoderPass]:
    return [task.read_by_decoder(batch["input_ids"], batch["loss_mask"]), task.read_by_decoder(batch["title_ids"])]
