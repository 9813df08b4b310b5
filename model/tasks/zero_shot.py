"""Zero-shot evaluation: a model answers a prompt about each clip of a benchmark that it was not fine-tuned for."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from model.causal_lm import ReadPrompts, room_for
from model.config.load import override_config
from model.config.schema import RunConfig
from model.data.annotations import Annotation
from model.data.conversations import Conversation, text_of
from model.data.loading.loader import Batch, Example
from model.data.shards.reader import read_dataset_info
from model.errors import ConfigError
from model.mplug_owl_video import MplugOwlConfig
from model.mplug_video import MPlugVideoConfig
from model.mplug_video.processing import clean_caption
from model.pretrained import load_pretrained
from model.tasks import classification, metrics
from model.tasks.base import Evaluator
from model.tasks.captioning import MAX_WORDS, NUM_BEAMS, Captioning, captioned
from model.tasks.families import Family, MplugOwlFamily, MPlugVideoFamily, Prompts
from model.tasks.instruction import ANSWER_PROTOCOL, Instruction, answered, longest_answer
from model.tasks.metrics import Measures, Prediction, Predictions, Scores

PROMPTS: dict[str, dict[str, dict[str, str]]] = {
    MPlugVideoConfig.model_type: {
        "classification": {"title": classification.PROMPT, "video": "视频类目："},
        "captioning": {"none": "", "content": "这个视频的内容是："},
        "instruction": {"question": "问题：{text} 答案："},
    },
    MplugOwlConfig.model_type: {
        "classification": {
            "title": "视频标题：{text}\n这个视频属于以下哪个类目？{classes}",
            "video": "这个视频属于以下哪个类目？{classes}",
        },
        "captioning": {"describe": "请用一句话描述这个视频。"},
        "instruction": {"question": "{text}", "brief": "{text}请用一个词回答。"},
    },
}
"""Family -> dataset -> prompts by name, the default first. {text}: title or question; {classes}: all categories."""


class ZeroShot(Evaluator):
    """What the benchmarks have in common: a question per clip, and a written answer."""

    num_beams: ClassVar[int] = 1
    rules: ClassVar[dict[str, str]] = {}
    """The part of the protocol that is that of fine-tuned models."""

    def __init__(self, config: RunConfig, model: Any, processor: Any, prompt: str = "") -> None:
        """`prompt` is a name of PROMPTS; empty: the first of the family and the dataset. Raises ConfigError."""
        super().__init__(config, model, processor)
        kind = model.config.model_type
        self.family: Family
        if kind == MplugOwlConfig.model_type:
            self.family = MplugOwlFamily(model, processor, config)
        else:
            self.family = MPlugVideoFamily(model, processor)
        named = PROMPTS[kind][config.task]
        self.prompt = prompt or next(iter(named))
        if self.prompt not in named:
            raise ConfigError(f"--prompt must be one of {', '.join(named)} for {config.task}, got {prompt}.")
        self.template = named[self.prompt]

    @property
    def protocol(self) -> dict[str, str]:
        search = f"{self.num_beams} beams" if self.num_beams > 1 else "greedy"
        decoding = f"{search}, at most {self.max_new_tokens} tokens"
        return {"prompt": self.prompt, "prompt_text": self.template, "decoding": decoding, **self.rules}

    @abstractmethod
    def references(self, annotations: list[Annotation]) -> list[str]:
        """Right answers of a split, from which the longest written answer follows."""

    @abstractmethod
    def prediction(self, annotation: Annotation, answer: str) -> Prediction:
        """The prediction of a clip, from a written answer."""

    def question(self, annotation: Annotation) -> Conversation:
        """The conversation that the model continues."""
        parts = [{"type": "video", "video": annotation.video}]
        title = clean_caption(annotation.text, MAX_WORDS)[: self.config.data.max_length - classification.PROMPT_RESERVE]
        if text := self.template.format(text=title, classes="、".join(self.categories)):
            parts.append({"type": "text", "text": text})
        return [{"role": "user", "content": parts}]

    def read_split(self, annotations: list[Annotation]) -> None:
        """Sets the longest answer. Raises DataError if a question does not fit, or is not one of the model's kind."""
        questions = [self.question(annotation) for annotation in annotations]
        wanted = longest_answer(self.processor.tokenizer, self.references(annotations))
        self.max_new_tokens = room_for(self.family.decoder.config, max(map(self.family.length, questions)), wanted)

    def collate_evaluation(self, examples: list[Example]) -> Batch:
        return self.family.ask(examples, [self.question(example.annotation) for example in examples])

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        return self.answer(self.family.embed(batch), batch["annotations"])

    def answer(self, prompts: Prompts, annotations: list[Annotation]) -> list[Prediction]:
        written = self.family.decoder.generate(
            inputs_embeds=prompts.embeddings,
            attention_mask=prompts.mask,
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
        )
        answers = self.family.texts(written)
        return [self.prediction(annotation, text) for annotation, text in zip(annotations, answers, strict=True)]


class ZeroShotClassification(ZeroShot):
    """By the likelihood of each category's name as the answer, and by the category that a written answer names."""

    metrics = ("generation_top1", "generation_top5", "written_top1")
    headline = "generation_top1"

    def __init__(self, config: RunConfig, model: Any, processor: Any, prompt: str = "") -> None:
        super().__init__(config, model, processor, prompt)
        self.categories = read_dataset_info(config.data.shards)["class_names"]
        end = processor.tokenizer.eos_token_id
        names = processor.tokenizer(self.categories, add_special_tokens=False).input_ids
        self.answers = [[*ids, end] for ids in names]
        self.by_mean: bool = getattr(model.config, "mean_answer_scores", False)

    @property
    def protocol(self) -> dict[str, str]:
        return {**super().protocol, "likelihood": f"{'mean' if self.by_mean else 'sum'} of the tokens of a category"}

    def references(self, annotations: list[Annotation]) -> list[str]:
        return self.categories

    def answer(self, prompts: Prompts, annotations: list[Annotation]) -> list[Prediction]:
        scores = self._likelihoods(prompts).tolist()
        rows = zip(super().answer(prompts, annotations), scores, strict=True)
        return [{**row, "generation_scores": own} for row, own in rows]

    def _likelihoods(self, prompts: Prompts) -> Tensor:
        """Scores (B, N) of all categories after each prompt."""
        read = ReadPrompts(self.family.decoder, prompts.embeddings[:, :-1], prompts.mask[:, :-1])
        texts = [[[last, *answer] for answer in self.answers] for last in prompts.last_ids.tolist()]
        scores = read.log_likelihoods(texts, [[1] * len(self.answers)] * len(texts))
        return scores / torch.tensor(list(map(len, self.answers)), device=scores.device) if self.by_mean else scores

    def prediction(self, annotation: Annotation, answer: str) -> Prediction:
        return {
            "video": annotation.video,
            "text": annotation.text,
            "label": annotation.label,
            "answer": answer,
            "prediction": named_category(answer, self.categories),
        }

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        """Top-1 and top-5 accuracy of the likelihoods, and the share of answers that name the right category."""
        labels = classification.label_numbers(predictions, class_names)
        ranked = metrics.top_measures(metrics.column(predictions, "generation_scores"), labels, "generation_")
        return {**ranked, "written_top1": np.array([float(row["prediction"] == row["label"]) for row in predictions])}

    @staticmethod
    def chance(predictions: Predictions, class_names: Sequence[str]) -> Scores:
        count = len(class_names)
        return {"generation_top1": 1 / count, "generation_top5": min(5 / count, 1), "written_top1": 1 / count}

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return [(row["answer"], row["label"]) for row in predictions]


class ZeroShotCaptioning(ZeroShot):
    num_beams, rules = NUM_BEAMS, metrics.CAPTION_PROTOCOL
    metrics, headline = Captioning.metrics, Captioning.headline
    measure, captions = staticmethod(Captioning.measure), staticmethod(Captioning.captions)

    def references(self, annotations: list[Annotation]) -> list[str]:
        return [text for annotation in annotations for text in annotation.references or [annotation.text]]

    def prediction(self, annotation: Annotation, answer: str) -> Prediction:
        return captioned(annotation, answer)


class ZeroShotInstruction(ZeroShot):
    """Question answering."""

    rules = ANSWER_PROTOCOL
    metrics, headline = Instruction.metrics, Instruction.headline
    measure, chance = staticmethod(Instruction.measure), staticmethod(Instruction.chance)
    captions = staticmethod(Instruction.captions)

    def question(self, annotation: Annotation) -> Conversation:
        return [self._prompted(message) for message in annotation.conversation[:-1]]

    def _prompted(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with the prompt around its question, the last text of the user."""
        parts = message["content"]
        texts = [place for place, part in enumerate(parts) if part["type"] == "text"]
        if message["role"] != "user" or not texts:
            return message
        asked = {"type": "text", "text": self.template.format(text=parts[texts[-1]]["text"])}
        return {**message, "content": [*parts[: texts[-1]], asked, *parts[texts[-1] + 1 :]]}

    def references(self, annotations: list[Annotation]) -> list[str]:
        return [text_of(annotation.conversation[-1]) for annotation in annotations]

    def prediction(self, annotation: Annotation, answer: str) -> Prediction:
        return answered(annotation, answer)


BENCHMARKS: dict[str, type[ZeroShot]] = {
    "classification": ZeroShotClassification,
    "captioning": ZeroShotCaptioning,
    "instruction": ZeroShotInstruction,
}
"""Datasets that can be evaluated without fine-tuning."""


def zero_shot_config(
    model: str, shards: str, overrides: Sequence[str] = (), tracking: Mapping[str, str] | None = None
) -> RunConfig:
    """The configuration of a zero-shot evaluation. Raises ConfigError if the dataset has none."""
    dataset = read_dataset_info(shards)["dataset"]
    if dataset not in BENCHMARKS:
        raise ConfigError(f"--zero-shot needs shards of {', '.join(BENCHMARKS)}, but {shards} are of {dataset}.")
    tree = {
        "name": f"zero-shot-{dataset}",
        "task": dataset,
        "model": {"init_from": model},
        "data": {"shards": shards},
        "tracking": {**(tracking or {})},
    }
    return override_config(tree, overrides)


def build_zero_shot(config: RunConfig, prompt: str) -> ZeroShot:
    """Loads the model of `model.init_from`, and asks it by a prompt of PROMPTS, or by the default one."""
    model, processor = load_pretrained(config.model.init_from)
    return BENCHMARKS[config.task](config, model, processor, prompt)


def named_category(answer: str, names: Sequence[str]) -> str:
    """The only category whose name is in an answer; empty if there is none, or more than one.

    A name within a longer one that is in the answer does not count.
    """
    for name in sorted(names, key=len, reverse=True):
        if name in answer:
            others = answer.replace(name, "\0")
            return "" if any(other in others for other in names if other != name) else name
    return ""
