"""The matching variant of retrieval (ITM): whether a title belongs to a clip, as a generated answer and by a head.

The original code pairs negatives with the clip they belong to, so that true pairs are labelled as false. Here a
negative is the title of another clip.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.config.schema import RunConfig
from model.data.annotations import Annotation
from model.data.loading.loader import Batch, Example
from model.mplug_video.configuration import MATCHING_CLASSES
from model.mplug_video.processing import clean_caption
from model.tasks import metrics
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.classification import SOURCES, answer_and_head_loss, answer_and_head_passes, example_answers
from model.tasks.metrics import Measures, Prediction, Predictions, Scores

PROMPT = "标题：{} 这个视频与标题匹配吗？"  # the prompt of the released models
PROMPT_RESERVE = 20  # characters by which the title is shortened, for the words of the prompt
MAX_WORDS = 80
NEGATIVES = 2
"""Number of titles of other clips per clip."""


class Matching(Task):
    architecture = "MPlugVideoForClassification"
    planned_classes = len(MATCHING_CLASSES)
    metrics = tuple(prefix + name for prefix in SOURCES.values() for name in metrics.RECALL_METRICS)
    headline = "text_to_video_r1"

    @classmethod
    def class_names(cls, config: RunConfig) -> list[str]:
        return MATCHING_CLASSES

    @property
    def protocol(self) -> dict[str, str]:
        return {"prompt_text": PROMPT, "similarity": "of all pairs, by the head", **metrics.SEARCH_PROTOCOL}

    def collate(self, examples: list[Example]) -> Batch:
        pairs = [(row, row, 1) for row in range(len(examples))]  # (clip, title, whether they match)
        for row, example in enumerate(examples):
            others = [n for n, other in enumerate(examples) if other.annotation.video != example.annotation.video]
            drawn = random.Random(example.seed).sample(others, min(NEGATIVES, len(others)))
            pairs += [(row, other, 0) for other in drawn]
        titles = [self._title(examples[title].annotation) for _, title, _ in pairs]
        return {
            "frames": self.stack_frames(examples),
            "clips": torch.tensor([clip for clip, _, _ in pairs]),
            "labels": torch.tensor([label for _, _, label in pairs]),
            **self._questions(titles, [MATCHING_CLASSES[label] for _, _, label in pairs]),
        }

    def example_batch(self, clips: int) -> Batch:
        rows = (1 + NEGATIVES) * clips
        return {
            "frames": self.example_frames(clips),
            "clips": torch.arange(rows) % clips,
            **example_answers(self, rows),
        }

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        return answer_and_head_passes(self, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        prefix = self.model.encode_video(batch["pixel_values"]).prefix
        return answer_and_head_loss(self.model, prefix[batch["clips"]], batch)

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        annotations = [example.annotation for example in examples]
        return {"frames": self.stack_frames(examples), "annotations": annotations}

    def read_split(self, annotations: list[Annotation]) -> None:
        length = self.config.data.max_length
        titles = [self._title(annotation) for annotation in annotations]
        questions = [self.processor.choices(self._question(title), MATCHING_CLASSES[1:], length) for title in titles]
        self.titles = self.processor.sentences(titles, length)
        self.answers, self.answer_starts = [row for (row,), _ in questions], [start for _, (start,) in questions]

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        """Scores of every title of the split for each clip: the likelihood of 是, and the probability of the head."""
        visual, predictions = self.model.encode_video(batch["pixel_values"]).prefix, []
        for row, annotation in enumerate(batch["annotations"]):
            prefix = self.model.read_prefixes(visual[row, None])
            answers = self.model.score_answers(prefix, [self.answers], [self.answer_starts])[0]
            head = self.model.classify_texts(prefix, [self.titles])[0]
            predictions.append(
                {
                    "video": annotation.video,
                    "text": annotation.text,
                    "generation_scores": answers.float().cpu().numpy(),
                    "head_scores": head.float().softmax(dim=1)[:, 1].cpu().numpy(),
                }
            )
        return predictions

    @staticmethod
    def finish(predictions: list[Prediction]) -> list[Prediction]:
        """Replaces the scores of all titles by ranks, for the head's probabilities and the likelihoods of 是."""
        ranks = []
        for source, prefix in SOURCES.items():
            scores = np.stack([row[source] for row in predictions])  # (clips, texts)
            ways = (lambda block, scores=scores.T: scores[block]), (lambda block, scores=scores: scores[block])
            ranks.append(metrics.ranked(predictions, *ways, prefix=prefix))
        return [head | answer for head, answer in zip(*ranks, strict=True)]

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """Ranks as in retrieval, by the head's probabilities and by the answers' likelihoods (`generation_`)."""
        return metrics.rank_measures(predictions, tuple(SOURCES.values()))

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        return metrics.recall_chance(predictions)

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return metrics.nearest_texts(predictions)

    def _title(self, annotation: Annotation) -> str:
        return clean_caption(annotation.text, MAX_WORDS)

    def _question(self, title: str) -> str:
        return PROMPT.format(title[: self.config.data.max_length - PROMPT_RESERVE])

    def _questions(self, titles: list[str], answers: list[str]) -> Batch:
        """Token IDs of prompts with answers, and of the titles, which the head reads."""
        length = self.config.data.max_length
        ids, loss_mask = self.processor.pairs(zip(map(self._question, titles), answers, strict=True), length)
        title_ids, title_mask = self.processor.texts(titles, length)
        return {"input_ids": ids, "loss_mask": loss_mask, "title_ids": title_ids, "title_mask": title_mask}
