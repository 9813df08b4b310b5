"""Numbers of the original code: features, logits, losses, gradients, generated tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.mplug_owl_video import MplugOwlForConditionalGeneration, MplugOwlProcessor
from tests.helpers.owl import CHECKPOINT, CLIP, OwlRecording

GENERATE, LLAMA = OwlRecording("bloom_generate"), OwlRecording("llama_generate")
CASES = [
    (recording, case)
    for recording in (GENERATE, LLAMA)
    for case in recording.facts["cases"]
    if f"out/{case}/sequences" in recording.tensors
]


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


@pytest.fixture(scope="module")
def forward() -> OwlRecording:
    return OwlRecording("bloom_forward")


@pytest.fixture(scope="module")
def model(forward: OwlRecording) -> MplugOwlForConditionalGeneration:
    return forward.model()


@pytest.fixture
def outputs(model: MplugOwlForConditionalGeneration) -> Iterator[dict[str, Tensor]]:
    """Outputs of the modules during a test, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(name, output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_every_layer_of_vision_model_and_abstractor(
    model: MplugOwlForConditionalGeneration, forward: OwlRecording, outputs: dict[str, Tensor], kind: str
) -> None:
    pixels = forward["in/pool/video_pixel_values" if kind == "video" else "in/pool/pixel_values"][:2]
    vectors = model.encode_media(pixels)
    ours = {
        "vision_hidden.0": outputs["vision_model.embeddings"],
        "vision_hidden.1": outputs["vision_model.encoder.layers.0"],
        "vision_hidden.2": outputs["vision_model.encoder.layers.1"],
        "vision_last_hidden_state": outputs["vision_model"],
        "vision_pooler_output": model.vision_model.post_layernorm(outputs["vision_model"][:, :, 0].mean(dim=1)),
        "abstractor_layer.0": outputs["abstractor.encoder.layers.0"],
        "abstractor_layer.1": outputs["abstractor.encoder.layers.1"],
        "abstractor_pooler_output": outputs["abstractor.encoder.layers.1"][:, 0],
        "abstractor_last_hidden_state": vectors,
    }
    if kind == "video":
        cls = outputs["vision_model.embeddings"][:, :, :1]
        ours["temporal_block.0"] = torch.cat((cls, outputs["vision_model.encoder.layers.0.temporal"]), dim=2)
    recorded = {name for name in forward.tensors if name.startswith(f"out/comp/{kind}/")}
    assert recorded == {f"out/comp/{kind}/{name}" for name in ours}
    for name, output in ours.items():
        assert_near(output, forward[f"out/comp/{kind}/{name}"])


@torch.no_grad()
def test_bloom_normalises_text_but_not_media(model: MplugOwlForConditionalGeneration, forward: OwlRecording) -> None:
    ids, decoder = forward["in/lm/input_ids"], model.language_model
    assert_near(decoder(ids).logits, forward["out/lm/logits_from_ids"])
    raw = nn.functional.embedding(ids, decoder.transformer.word_embeddings.weight)
    assert_near(decoder(inputs_embeds=raw).logits, forward["out/lm/logits_from_embeds"])


def labelled(recording: OwlRecording) -> dict[str, Tensor]:
    images, videos = int(recording["in/repaired/num_images"].sum()), int(recording["in/repaired/num_videos"].sum())
    inputs = {"input_ids": recording["in/repaired/input_ids"], "labels": recording["out/repaired/labels"]}
    return {**inputs, **recording.media(images, videos)}


@torch.no_grad()
def test_logits_and_loss_of_a_batch_with_images_and_videos(
    model: MplugOwlForConditionalGeneration, forward: OwlRecording
) -> None:
    batch = labelled(forward)
    embeddings = model.embed(**{name: value for name, value in batch.items() if name != "labels"})
    assert_near(embeddings, forward["out/repaired/inputs_embeds"])
    output = model(**batch)
    assert_near(output.loss, forward["out/repaired/loss"][0])
    assert_near(output.logits[:, forward["out/repaired/logits_positions"]], forward["out/repaired/logits_at_positions"])
    assert_near(output.logits.logsumexp(dim=-1), forward["out/repaired/logits_logsumexp"])
    assert torch.equal(output.logits.argmax(dim=-1), forward["out/repaired/logits_argmax"])


@pytest.mark.parametrize("run", ["wo_lora_video_repaired", "all_trainable_video_repaired"])
def test_gradients_and_one_step(forward: OwlRecording, run: str) -> None:
    expected = OwlRecording("train_step").facts["runs"][run]
    model, batch = forward.model().train(), labelled(forward)
    parameters = {name: value.requires_grad_(False) for name, value in model.named_parameters()}
    trained = {name: parameters[name].requires_grad_() for name in expected["grad_l2"]}
    loss = model(**batch).loss
    assert_near(loss.detach(), torch.tensor(expected["loss"]))
    loss.backward()
    for name, norm in expected["grad_l2"].items():
        gradient = trained[name].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    step = expected["step"]
    decayed = set(step["decayed_parameters"])
    groups = [
        {"params": [trained[name] for name in trained if (name in decayed) is is_decayed], "weight_decay": decay}
        for is_decayed, decay in ((True, step["weight_decay"]), (False, 0.0))
    ]
    total = nn.utils.clip_grad_norm_(trained.values(), step["clip"])
    assert float(total) == pytest.approx(step["total_grad_norm_before_clip"], rel=1e-4)
    torch.optim.AdamW(groups, lr=step["lr"]).step()
    with torch.no_grad():
        after = float(model(**batch).loss)
    assert after == pytest.approx(step["loss_after_step"], rel=1e-4)


@pytest.mark.parametrize(("recording", "case"), CASES, ids=[f"{item.name}-{case}" for item, case in CASES])
def test_generated_tokens(recording: OwlRecording, case: str) -> None:
    facts = recording.facts["cases"][case]
    outputs = [name for name in ("sequences", "repaired_sequences") if f"out/{case}/{name}" in recording.tensors]
    generated = recording.model().generate(
        recording[f"in/{case}/input_ids"],
        attention_mask=recording[f"in/{case}/attention_mask"],
        max_new_tokens=12,
        output_logits=True,
        return_dict_in_generate=True,
        **recording.media(facts["num_images"], facts["num_videos"]),
    )
    # the original code returns the begin token first, and its plain output of two videos shows the first one twice
    assert torch.equal(generated.sequences, recording[f"out/{case}/{outputs[-1]}"][:, 1:])
    recorded = recording[f"out/{case}/{outputs[-1].replace('sequences', 'step_logits')}"]
    logits = torch.stack(generated.logits[: recorded.shape[1]], dim=1)
    assert_near(logits, recorded, 2e-5)


def test_beams() -> None:
    generated = GENERATE.model().generate(
        GENERATE["in/video/input_ids"],
        max_new_tokens=12,
        num_beams=3,
        no_repeat_ngram_size=2,
        **GENERATE.media(0, 1),
    )
    assert torch.equal(generated, GENERATE["out/video/beam3_ngram2_sequences"][:, 1:])


def test_max_length_counts_the_begin_token_but_not_the_prompt() -> None:
    model, ids = GENERATE.model(), GENERATE["in/video/input_ids"]
    generated = model.generate(ids, max_length=12, **GENERATE.media(0, 1))
    assert torch.equal(generated, GENERATE["out/video/no_mask_sequences"][:, 1:12])


@pytest.mark.parametrize("num_frames", [4, 8])
def test_a_published_folder_answers_about_a_clip(num_frames: int) -> None:
    expected = OwlRecording("hf_checkpoint_expected")
    model = MplugOwlForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    processor = MplugOwlProcessor.from_pretrained(CHECKPOINT)
    inputs = processor(text=[expected.facts["prompt"]], videos=[CLIP], num_frames=num_frames, decoder="decord")
    for name in ("input_ids", "video_pixel_values"):
        assert torch.equal(inputs[name], expected[f"in/nf{num_frames}/{name}"])
    generated = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(generated, expected[f"out/nf{num_frames}/sequences"][:, 1:])
    assert processor.decode(generated[0], skip_special_tokens=True) == expected.facts[f"text_nf{num_frames}"]
