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
from model.tasks.base import DecoderPass, Logs, Prediction, Predictions, Scores, Task
from model.tasks.classification import SOURCES, answer_and_head_loss, answer_and_head_passes, example_answers

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
        titles = [self._title(annotation) for annotation in annotations]
        self.candidates = self._questions(titles, [MATCHING_CLASSES[1]] * len(titles))

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        """Scores of every title of the split for each clip: the likelihood of 是, and the probability of the head."""
        every = {name: tensor.to(self.model.device) for name, tensor in self.candidates.items()}
        prefixes, predictions = self.model.encode_video(batch["pixel_values"]).prefix, []
        for row, annotation in enumerate(batch["annotations"]):
            prefix = prefixes[row, None]
            answers = self.model.score_answers(prefix, every["input_ids"], every["loss_mask"])
            head = self.model.classify_candidates(prefix, every["title_ids"], every["title_mask"])
            predictions.append(
                {
                    "video": annotation.video,
                    "text": annotation.text,
                    "generation_scores": answers.float().tolist(),
                    "head_scores": head.float().softmax(dim=1)[:, 1].tolist(),
                }
            )
        return predictions

    @staticmethod
    def score(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        """Recalls as in retrieval, by the head's probabilities and by the answers' likelihoods (`generation_`)."""
        scores: Scores = {}
        for source, prefix in SOURCES.items():
            similarity = np.array([prediction[source] for prediction in predictions])  # (clips, texts)
            found = metrics.recall_scores(predictions, similarity.T, similarity)
            scores |= {prefix + name: value for name, value in found.items()}
        return scores

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        return metrics.recall_chance(predictions)

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return metrics.nearest_texts(predictions, np.array([row["head_scores"] for row in predictions]))

    @staticmethod
    def nearest_clips(predictions: Predictions, count: int) -> list[list[int]]:
        return metrics.nearest_columns(np.array([row["head_scores"] for row in predictions]).T, count)

    def _title(self, annotation: Annotation) -> str:
        return clean_caption(annotation.text, MAX_WORDS)

    def _questions(self, titles: list[str], answers: list[str]) -> Batch:
        """Token IDs of prompts with answers, and of the titles, which the head reads."""
        length = self.config.data.max_length
        questions = [PROMPT.format(title[: length - PROMPT_RESERVE]) for title in titles]
        ids, loss_mask = self.processor.pairs(zip(questions, answers, strict=True), length)
        title_ids, title_mask = self.processor.texts(titles, length)
        return {"input_ids": ids, "loss_mask": loss_mask, "title_ids": title_ids, "title_mask": title_mask}
