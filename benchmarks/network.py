"""Compares the networks with a plain implementation that computes like upstream, on the same weights and inputs.

    python -m benchmarks.network            # on a GPU if there is one; writes benchmarks/results/model-<device>.json

The plain implementation uses eager attention with a softmax in fp32, logits of the whole sequence and a fp32 copy of
them, dropout in the frozen decoder, a prefix that is recomputed for every class and every beam, and one clip at a time
in beam search. Sizes are those of the only published timing of the original code on a CPU. Each measurement runs in a
new process, and the two implementations are interleaved. Memory excludes weights and program.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from benchmarks.interleaved import compare, run, write_report
from model.layers import Linear
from model.mplug_video import (
    MPlugVideoConfig,
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    vision,
)
from model.mplug_video.decoding import beam_search

BATCH, TOKENS, CLASSES, BEAMS, NEW_TOKENS = 4, 40, 45, 5, 20
PROMPT_TOKENS = (
    28  # 40 tokens are common to all classes; then follow a name, one token per character, and the end token
)
CLASS_NAMES = Path(__file__).parents[1] / "tests" / "fixtures" / "classname.json"
END = -1  # no token, so that every search generates NEW_TOKENS
VISION = {
    "image_size": 112,
    "patch_size": 16,
    "num_frames": 8,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
TEXT = {
    "model_type": "gpt2",
    "n_embd": 512,
    "n_layer": 6,
    "n_head": 8,
    "vocab_size": 51200,
    "n_positions": 2048,
    "activation_function": "gelu_pytorch_tanh",
    "bos_token_id": 5,
    "eos_token_id": 7,
    "pad_token_id": 7,
}
Model = MPlugVideoForConditionalGeneration | MPlugVideoForClassification


def eager_attention(self: vision.Attention, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    x = scores.softmax(dim=-1).to(x.dtype) @ v
    return self.proj(x.transpose(1, 2).reshape(batch, length, width))


def plain_layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def plain_attention(self: vision.Attention, x: Tensor, then: nn.Linear | None = None) -> Tensor:
    return eager_attention(self, x) if then is None else then(eager_attention(self, x))


class MegatronCrossEntropy(torch.autograd.Function):
    """Vocabulary cross entropy of Megatron-LM v3 on one rank."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits - logits.max(dim=-1, keepdim=True).values
        predicted = logits.gather(1, labels[:, None]).squeeze(1).clone()
        exponentials = logits.exp_()
        total = exponentials.sum(dim=-1)
        ctx.save_for_backward(exponentials.div_(total[:, None]), labels)
        return total.log() - predicted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        softmax, labels = ctx.saved_tensors
        softmax[torch.arange(len(labels)), labels] -= 1
        return softmax.mul_(gradient[:, None]), None


def plain_losses(model: Model, prefix: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Losses of text tokens, from logits and their fp32 copy at every position, including visual ones."""
    embeddings = torch.cat((prefix, model.decoder.get_input_embeddings()(ids)), dim=1)
    logits = model.decoder(inputs_embeds=embeddings, use_cache=False).logits.float()
    visual, filler = torch.full((len(ids), prefix.shape[1] - 1), 100, device=ids.device), ids[:, :1]
    labels = torch.cat((visual, ids, filler), dim=1)  # at every position, although the last one is not used
    losses = MegatronCrossEntropy.apply(logits.flatten(0, 1), labels.flatten()).view(labels.shape)
    return losses[:, prefix.shape[1] : -1] * mask


def plain_beam_search(model: Model, embeddings: Tensor) -> list[int]:
    """One clip; the prefix is processed once per beam, with logits at all its positions."""
    cache, sums, written = DynamicCache(config=model.decoder.config), torch.zeros(BEAMS, 1), torch.empty(BEAMS, 0)
    sums[1:] = -torch.inf
    inputs = embeddings.expand(BEAMS, -1, -1)
    for _ in range(NEW_TOKENS):
        logits = model.decoder(inputs_embeds=inputs, past_key_values=cache, use_cache=True).logits.float()[:, -1]
        totals = logits.log_softmax(dim=-1) + sums.to(logits.device)
        values, flat = totals.flatten().topk(2 * BEAMS)
        beams, tokens = (flat // totals.shape[1])[:BEAMS], (flat % totals.shape[1])[:BEAMS]
        written = torch.cat((written.to(beams.device)[beams], tokens[:, None]), dim=1)
        sums = values[:BEAMS, None]
        cache.reorder_cache(beams)
        inputs = model.decoder.get_input_embeddings()(tokens[:, None])
    return written[0].long().tolist()


def build(path: str, kind: type[Model], device: str) -> Model:
    plain = path == "plain"
    torch.manual_seed(0)
    config = MPlugVideoConfig(
        vision_config=VISION,
        text_config=TEXT,
        num_queries=64,
        decoder_dropout=plain,
        class_names=[str(number) for number in range(CLASSES)],
    )
    model = kind(config)
    if plain:
        model.decoder.set_attn_implementation("eager")
        vision.Attention.forward = plain_attention
        nn.LayerNorm.forward = plain_layer_norm
        Linear.forward = nn.Linear.forward
        vision.recompute_intermediate = vision.keep_intermediate
    return model.to(device)


def training(
    path: str, device: str, dtype: torch.dtype = torch.float32, checkpointed: tuple[str, ...] = ()
) -> tuple[Callable[[], object], int]:
    model = build(path, MPlugVideoForConditionalGeneration, device).to(dtype).train()
    model.checkpoint_activations(checkpointed)
    if device == "cpu" and dtype == torch.bfloat16 and path == "ours":
        # like the engine: plain products are faster on CPU
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    clips, ids = (
        torch.randn(BATCH, 3, 8, 112, 112, device=device),
        torch.randint(8, 51200, (BATCH, TOKENS), device=device),
    )
    mask = torch.ones(BATCH, TOKENS - 1, device=device)

    def step() -> float:
        model.zero_grad()
        if path == "plain":
            loss = plain_losses(model, model.encode_video(clips).prefix, ids, mask).sum() / mask.sum()
        else:
            loss = model(clips, ids, mask)
        loss.backward()
        return loss.item()

    return step, 5


@torch.no_grad()
def classes(path: str, device: str) -> tuple[Callable[[], object], int]:
    model = build(path, MPlugVideoForClassification, device).eval()
    clip = torch.randn(1, 3, 8, 112, 112, device=device)
    ids = torch.randint(8, 51200, (CLASSES, TOKENS), device=device)
    ids[:, :PROMPT_TOKENS] = ids[:1, :PROMPT_TOKENS]
    lengths = torch.tensor([[len(name) + 1] for name in json.loads(CLASS_NAMES.read_text())], device=device)
    position = torch.arange(1, TOKENS, device=device)  # of the token that a column's loss refers to
    mask = ((position >= PROMPT_TOKENS) & (position < PROMPT_TOKENS + lengths)).float()
    texts = [row[: PROMPT_TOKENS + int(length)].tolist() for row, length in zip(ids, lengths, strict=True)]
    starts = [PROMPT_TOKENS] * CLASSES

    @torch.no_grad()
    def score() -> list[float]:
        prefix = model.encode_video(clip).prefix
        if path == "plain":
            return (-plain_losses(model, prefix.expand(CLASSES, -1, -1), ids, mask).sum(dim=1)).tolist()
        return model.score_answers(model.read_prefixes(prefix), [texts], [starts])[0].tolist()

    return score, 3


@torch.no_grad()
def captions(path: str, device: str) -> tuple[Callable[[], object], int]:
    model = build(path, MPlugVideoForConditionalGeneration, device).eval()
    clips, begin = torch.randn(BATCH, 3, 8, 112, 112, device=device), torch.full((BATCH, 1), 5, device=device)

    @torch.no_grad()
    def write() -> list[list[int]]:
        prefix = model.encode_video(clips).prefix
        embeddings = torch.cat((prefix, model.decoder.get_input_embeddings()(begin)), dim=1)
        if path == "plain":
            return [plain_beam_search(model, row[None]) for row in embeddings]
        found = beam_search(
            model.decoder, embeddings, num_beams=BEAMS, max_new_tokens=NEW_TOKENS, width=NEW_TOKENS + 1, end=END
        )
        return [row.found[0][1] for row in found]

    return write, 3


JOBS = {
    "training step, fp32": training,
    "training step, bf16": partial(training, dtype=torch.bfloat16),
    "the same, vision checkpointed": partial(training, dtype=torch.bfloat16, checkpointed=("vision",)),
    "scores of 45 classes, 1 clip": classes,
    "captions of 4 clips, 5 beams": captions,
}


def report(rounds: int, device: str) -> None:
    rows = compare("benchmarks.network", JOBS, rounds, device)
    scores = [rows["scores of 45 classes, 1 clip"][path]["result"] for path in ("ours", "plain")]
    difference = max(abs(a - b) / abs(b) for a, b in zip(*scores, strict=True))
    print(f"largest relative difference of a class's score: {difference:.1e}")
    write_report("model", rows, device, rounds=rounds, score_difference=difference)


if __name__ == "__main__":
    run(__doc__ or "", JOBS, report)
