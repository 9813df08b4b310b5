"""Compares the chat model with the same computation done as the original does, on the same weights and inputs.

    python -m benchmarks.chat            # on a GPU if there is one; writes benchmarks/results/chat-<device>.json

The plain way computes the attention of vision model, abstractor and Bloom step by step, with a softmax in fp32,
convolutions over time as such, and logits of all positions with a fp32 copy of them, also for a prompt. Frozen parts
keep their dropout. The sizes are those of the only published timing of the original code of mPLUG-Video on a CPU, with
a Bloom decoder and an abstractor of two layers.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomForCausalLM, BloomGelu

from benchmarks.interleaved import compare, measured, run, write_report
from model.config.load import load_config
from model.layers import Linear, linear
from model.mplug_owl_video import abstractor, bloom, vision
from model.mplug_owl_video.chat import Chat
from model.mplug_owl_video.configuration import VIDEO_ID
from model.mplug_owl_video.modeling import MplugOwlForConditionalGeneration
from model.tasks.build import build_meta_task
from model.tasks.instruction import Instruction
from model.training.flops import step_flops

BATCH, TOKENS, QUERIES, NEW_TOKENS = 4, 40, 64, 20
PRODUCT = 2048
MODULE = "benchmarks.chat"
LENGTH = 1 + QUERIES + TOKENS
SIZES = [
    "data.shards=none",
    "model.decoder=none",
    "model.vision={image_size: 112, patch_size: 16, num_frames: 8, hidden_size: 384, num_hidden_layers: 6, "
    "num_attention_heads: 6}",
    "model.abstractor={num_hidden_layers: 2, num_attention_heads: 6, intermediate_size: 1536}",
    "model.text={model_type: bloom, hidden_size: 512, n_layer: 6, n_head: 8, vocab_size: 51200}",
    f"model.num_queries={QUERIES}",
    f"data.max_length={LENGTH}",
    "training.precision=fp32",
]
FROZEN = ["model.freeze_vision=true", "model.freeze_abstractor=true"]
STEPS = {
    "training step with LoRA": ["model.lora.rank=8", "model.freeze_decoder=true", *FROZEN],
    "training step of the decoder": FROZEN,
    "training step of all weights": [],
}
"""The first two are what the original's scripts train."""
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "mplug_owl_video"
QUESTIONS = ("视频里有什么？", "它往哪里动？")


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    return F.dropout(scores.softmax(dim=-1).to(q.dtype), dropout) @ v


def layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def embed_patches(pixel_values: Tensor, convolution: nn.Conv2d) -> Tensor:
    frames = pixel_values.transpose(1, 2)
    return convolution(frames.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])


def temporal_block(self: vision.TemporalBlock, patches: Tensor, _apply: Any) -> Tensor:
    batch, frames, count, width = patches.shape
    side = int(count**0.5)
    x = self.ln(patches).view(batch, frames, side, side, width).permute(0, 4, 1, 2, 3)
    x = vision.quick_gelu(nn.Conv3d.forward(self.conv, nn.Conv3d.forward(self.down_proj, x)))
    return nn.Conv3d.forward(self.up_proj, x).permute(0, 2, 3, 4, 1).reshape(batch, frames, count, width)


def all_logits(self: BloomForCausalLM, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
    return BLOOM_FORWARD(self, *args, **kwargs)


BLOOM_FORWARD = BloomForCausalLM.forward


def build(path: str, device: str, settings: list[str]) -> Instruction:
    is_plain = path == "plain"
    if is_plain:
        vision.attention_output = abstractor.attention_output = attention
        vision.embed_patches = embed_patches
        vision.TemporalBlock.forward = temporal_block
        vision.recompute_intermediate = abstractor.recompute_intermediate = vision.keep_intermediate
        nn.LayerNorm.forward = layer_norm
        Linear.forward = nn.Linear.forward
        bloom.FusedBloomAttention = BloomAttention
        BloomForCausalLM.forward = all_logits
    torch.manual_seed(0)
    task = build_meta_task(load_config("tiny_instruction", [*SIZES, *settings]), device)
    model = task.model
    with torch.no_grad():  # a fresh temporal block has no effect
        for block in model.vision_model.encoder.layers:
            block.temporal.up_proj.weight.normal_(std=0.02)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.02)
    if is_plain:
        for block in model.language_model.transformer.h:
            block.mlp.gelu_impl = BloomGelu()
    return task


def training(path: str, device: str, settings: list[str]) -> tuple[Callable[[], object], int]:
    task = build(path, device, settings)
    model: MplugOwlForConditionalGeneration = task.model
    batch = {name: tensor.to(device) for name, tensor in task.example_batch(BATCH).items()}
    text = batch["input_ids"] >= 0
    batch["input_ids"][text] = torch.randint(8, 51200, batch["input_ids"].shape, device=device)[text]
    batch = task.normalize({**batch, "videos": torch.randint(0, 256, batch["videos"].shape, dtype=torch.uint8)})
    (nn.Module.train if path == "plain" else MplugOwlForConditionalGeneration.train)(model)

    def step() -> float:
        model.zero_grad()
        if path == "plain":
            labels = batch["input_ids"].clone()
            labels[:, 1:][batch["loss_mask"] != 1] = -100
            labels[:, 0] = -100
            loss = model(batch["input_ids"], video_pixel_values=batch["videos"], labels=labels).loss
        else:
            loss, _ = task.loss(batch)
        loss.backward()
        return loss.item()

    return step, 5


def greedy(path: str, device: str) -> tuple[Callable[[], object], int]:
    model = build(path, device, []).model.eval()
    ids = torch.randint(8, 51200, (2, LENGTH), device=device)
    ids[:, 1 : QUERIES + 2] = VIDEO_ID
    clips = torch.randn(2, 3, 8, 112, 112, device=device)
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    def write() -> list[list[int]]:
        return model.generate(ids, video_pixel_values=clips, **options).tolist()

    return write, 5


def conversation(_path: str, device: str, new_tokens: int) -> tuple[Callable[[], object], int]:
    """Seconds of a first question, which reads the clip, and of a second one."""
    task = build("ours", device, [])
    task.processor.tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "hf_checkpoint")
    options = {"do_sample": False, "min_new_tokens": new_tokens}
    video = (FIXTURES / "sample.mp4").read_bytes()
    chat = Chat(task.model, task.processor)
    times: list[tuple[float, float]] = []

    def ask() -> list[float]:
        chat.reset()
        start = time.perf_counter()
        chat.show_video(video)
        chat.ask(QUESTIONS[0], lambda _: None, new_tokens, **options)
        between = time.perf_counter()
        chat.ask(QUESTIONS[1], lambda _: None, new_tokens, **options)
        times.append((between - start, time.perf_counter() - between))
        return [statistics.median(column) for column in zip(*times[1:], strict=True)] if times[1:] else []

    return ask, 9


def product(path: str, device: str) -> tuple[Callable[[], object], int]:
    """A large matrix product: torch's, and that of our linear layers."""
    left, right = torch.randn(PRODUCT, PRODUCT, device=device), torch.randn(PRODUCT, PRODUCT, device=device)
    multiply = torch.mm if path == "plain" else partial(linear, bias=None)
    return (lambda: float(multiply(left, right)[0, 0])), 9


CONVERSATIONS = {"to the first token": 1, "of 20 tokens": NEW_TOKENS}
JOBS = {
    **{name: partial(training, settings=settings) for name, settings in STEPS.items()},
    "greedy, 20 tokens, batch 2": greedy,
    "matrix product": product,
    **{name: partial(conversation, new_tokens=count) for name, count in CONVERSATIONS.items()},
}


def report(rounds: int, device: str) -> None:
    rows = compare(MODULE, [name for name in JOBS if name not in CONVERSATIONS], rounds, device)
    rate = 2 * PRODUCT**3 / min(rows["matrix product"][path]["s"] for path in ("plain", "ours"))
    shares = {name: _step_flops(settings) / rows[name]["ours"]["s"] / rate for name, settings in STEPS.items()}
    for name, share in shares.items():
        print(f"{name}: {share:.0%} of this machine's rate of matrix products, {rate / 1e9:.0f} GFLOP/s")
    questions = {}
    for name in CONVERSATIONS:
        times = [measured(MODULE, name, "ours", device, {})["result"] for _ in range(rounds)]
        first, second = (statistics.median(column) for column in zip(*times, strict=True))
        questions[name] = {"first_s": first, "second_s": second, "times_faster": first / second}
        print(f"an answer {name}: first question {first:.3f} s, second one {second:.3f} s, {first / second:.1f} x")
    write_report("chat", rows, device, rounds=rounds, gemm_rate=rate, gemm_share=shares, questions=questions)


def _step_flops(settings: list[str]) -> float:
    task = build_meta_task(load_config("tiny_instruction", [*SIZES, *settings]))
    batch = task.example_batch(BATCH)
    return step_flops(task, task.vision_passes(batch), task.decoder_passes(batch)).total


if __name__ == "__main__":
    run(__doc__ or "", JOBS, report)
