"""Pre-training on (clip, title): captioning, and optionally a contrastive loss (arXiv 2306.04362 section 4.2)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.data.loading.loader import Batch, Example
from model.tasks.base import DecoderPass, Logs, Task
from model.tasks.gathering import gather, own_rows

LABEL_SMOOTHING = 0.1  # of the contrastive loss, as released
MAX_WORDS = 30


class Pretraining(Task):
    architecture = "MPlugVideoForPreTraining"

    def collate(self, examples: list[Example]) -> Batch:
        ids, mask = self.encode_texts(examples, MAX_WORDS)
        return {"frames": self.stack_frames(examples), "input_ids": ids, "attention_mask": mask}

    def example_batch(self, clips: int) -> Batch:
        ids = torch.ones(clips, self.config.data.max_length, dtype=torch.long)
        return {"frames": self.example_frames(clips), "input_ids": ids, "attention_mask": ids}

    def decoder_passes(self, batch: Batch) -> list[DecoderPass]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        passes = [self.read_by_decoder(ids, mask[:, 1:])]
        if self.model.config.use_contrastive:
            passes.append(DecoderPass(rows=len(ids), length=ids.shape[1], after_prefix=False))
        return passes

    def loss(self, batch: Batch) -> tuple[Tensor, Logs]:
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        video = model.encode_video(batch["pixel_values"])
        wanted = mask[:, 1:]
        caption = model.token_losses(video.prefix, ids, wanted).sum() / wanted.sum()
        if not model.config.use_contrastive:
            return caption, {}
        video_features, text_features = model.contrastive_features(video, ids, mask)
        contrastive = contrastive_loss(video_features, text_features, model.temperature)
        return caption + contrastive, {"loss_caption": caption.detach(), "loss_contrastive": contrastive.detach()}


def contrastive_loss(video: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """Contrastive loss over clips and titles of all processes. A clip's similarity is that of its most similar query.

    `video` (B, K, E) and `text` (B, E) are unit vectors.
    """
    all_video, all_text = gather(video), gather(text)
    video_to_text = torch.einsum("bke,ce->bkc", video, all_text).amax(dim=1).float() / temperature  # (B, all)
    text_to_video = torch.einsum("be,cke->bck", text, all_video).amax(dim=2).float() / temperature  # (B, all)
    targets = own_rows(len(text), text.device)
    to_text = F.cross_entropy(video_to_text, targets, label_smoothing=LABEL_SMOOTHING)
    to_video = F.cross_entropy(text_to_video, targets, label_smoothing=LABEL_SMOOTHING)
    return (to_text + to_video) / 2
