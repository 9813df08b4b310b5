"""Video captioning: trains on (clip, caption), generates captions by beam search."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.data.annotations import Annotation
from model.data.loading.loader import Batch, Example
from model.tasks import metrics
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.metrics import Measures, Prediction, Predictions

MAX_WORDS = 80
NUM_BEAMS = 5
RELEASED_NEW_TOKENS = 119
"""Size of the released search's buffer: 20 positions for a prompt and 100 tokens, minus the begin token."""


class Captioning(Task):
    """Captions have no prompt, as in the released recipe, so every token of a caption is trained."""

    architecture = "MPlugVideoForConditionalGeneration"
    metrics = metrics.CAPTION_METRICS
    headline = "cider"

    @property
    def max_new_tokens(self) -> int:
        return RELEASED_NEW_TOKENS if self.model.config.released_beam_search else self.config.data.max_length

    @property
    def protocol(self) -> dict[str, str]:
        released = ", released search" if self.model.config.released_beam_search else ""
        decoding = f"{NUM_BEAMS} beams{released}, at most {self.max_new_tokens} tokens"
        return {"decoding": decoding, **metrics.CAPTION_PROTOCOL}

    def collate(self, examples: list[Example]) -> Batch:
        ids, mask = self.encode_texts(examples, MAX_WORDS)
        return {"frames": self.stack_frames(examples), "input_ids": ids, "loss_mask": mask[:, 1:]}

    def example_batch(self, clips: int) -> Batch:
        ids = torch.ones(clips, self.config.data.max_length, dtype=torch.long)
        return {"frames": self.example_frames(clips), "input_ids": ids, "loss_mask": ids[:, 1:]}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        return [self.read_by_decoder(batch["input_ids"], batch["loss_mask"])]

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        return self.model(**batch), {}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Prediction]:
        pixels = batch["pixel_values"]
        written = self.model.generate(
            pixels,
            self.processor.begin(len(pixels)).to(pixels.device),
            num_beams=NUM_BEAMS,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        texts = self.processor.captions(written)
        return [captioned(annotation, text) for annotation, text in zip(batch["annotations"], texts, strict=True)]

    @staticmethod
    def measure(predictions: Predictions, class_names: Sequence[str]) -> Measures:
        return metrics.caption_measures(predictions)

    @staticmethod
    def captions(predictions: Predictions) -> list[tuple[str, str]]:
        return [(row["prediction"], row["references"][0]) for row in predictions]


def captioned(annotation: Annotation, text: str) -> Prediction:
    """The prediction of a clip's caption."""
    references = list(annotation.references or [annotation.text])
    return {"video": annotation.video, "prediction": text, "references": references}
