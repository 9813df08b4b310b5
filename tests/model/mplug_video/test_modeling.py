from copy import deepcopy
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import causal_lm
from model.layers import Linear
from model.mplug_video import (
    MPlugVideoConfig,
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
    MPlugVideoForRetrieval,
    vision,
)
from model.mplug_video.modeling import compile_layers

VISION = {"image_size": 32, "patch_size": 8, "num_frames": 3, "hidden_size": 32, "num_hidden_layers": 2}
TEXT = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 64,
    "bos_token_id": 5,
    "eos_token_id": 7,
    "pad_token_id": 7,
}
ALL = [
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
    MPlugVideoForClassification,
    MPlugVideoForRetrieval,
]


def config(**changes: object) -> MPlugVideoConfig:
    vision = {**VISION, "num_attention_heads": 4}
    fields = {"num_queries": 5, "contrastive_size": 16, "use_contrastive": True, "class_names": ["a", "b", "c"]}
    return MPlugVideoConfig(vision_config=vision, text_config=TEXT, **{**fields, **changes})


def clips(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> MPlugVideoForPreTraining:
    torch.manual_seed(0)
    return MPlugVideoForPreTraining(config()).eval()


def test_losses_match_full_logits(model: MPlugVideoForPreTraining) -> None:
    ids = torch.randint(8, 100, (2, 9))
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    prefix = model.encode_video(clips()).prefix
    embeddings = torch.cat((prefix, model.decoder.get_input_embeddings()(ids)), dim=1)
    logits = model.decoder(inputs_embeds=embeddings).logits[:, 5:-1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask
    torch.testing.assert_close(model.token_losses(prefix, ids, mask), expected)
    torch.testing.assert_close(model(clips(), ids, mask), expected.sum() / mask.sum())


def test_right_padding_does_not_change_results(model: MPlugVideoForPreTraining) -> None:
    ids, mask = torch.randint(8, 100, (2, 6)), torch.ones(2, 5)
    longer, longer_mask = F.pad(ids, (0, 4), value=7), F.pad(mask, (0, 4))
    torch.testing.assert_close(model(clips(), ids, mask), model(clips(), longer, longer_mask))


def test_a_new_model_has_no_temporal_attention(
    model: MPlugVideoForPreTraining,
) -> None:
    video = clips()
    swapped = video.flip(2)
    patches = model.vision_encoder(video)[:, 1:].unflatten(1, (3, 16))
    torch.testing.assert_close(patches, model.vision_encoder(swapped)[:, 1:].unflatten(1, (3, 16)).flip(1))
    torch.nn.init.normal_(model.vision_encoder.temporal_embed)
    assert not torch.allclose(patches, model.vision_encoder(swapped)[:, 1:].unflatten(1, (3, 16)).flip(1), atol=1e-2)


def test_greedy_generation_equals_repeated_argmax(model: MPlugVideoForPreTraining) -> None:
    torch.nn.init.normal_(model.visual_projection.weight, std=1.0)  # makes the result depend on the clips
    begin = torch.full((2, 1), 5)
    written = model.generate(clips(), begin, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=7)
    sequence = begin
    prefix = model.encode_video(clips()).prefix
    for _ in range(6):
        states = model.decode(prefix, sequence)[:, -1]
        best = model.decoder.get_output_embeddings()(states).argmax(dim=-1, keepdim=True)
        sequence = torch.cat((sequence, best), dim=1)
    assert written.tolist() == sequence[:, 1:].tolist()


@pytest.mark.parametrize("released", [False, True])
def test_sampling_is_seeded_and_beams_find_likelier_texts(model: MPlugVideoForPreTraining, released: bool) -> None:
    model.config.released_beam_search = released
    torch.nn.init.normal_(model.decoder.get_input_embeddings().weight, std=0.1)
    begin = torch.full((2, 1), 5)
    sampled = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampled.append(model.generate(clips(), begin, do_sample=True, top_k=0, top_p=0.9, max_new_tokens=8).tolist())
    assert sampled[0] == sampled[1] != sampled[2]
    if released:
        with pytest.raises(ValueError, match="released_beam_search takes no min_new_tokens"):
            model.generate(clips(), begin, num_beams=5, min_new_tokens=8)
        return

    likelihoods = []
    for beams in (1, 5):
        written = model.generate(clips(), begin, num_beams=beams, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        ids = torch.cat((begin, written), dim=1)
        with torch.no_grad():
            losses = model.token_losses(model.encode_video(clips()).prefix, ids, torch.ones(2, written.shape[1]))
        likelihoods.append(-losses.sum(dim=1))
    assert (likelihoods[1] >= likelihoods[0] - 1e-4).all()


def test_answers_are_scored_by_the_sum_of_their_tokens() -> None:
    model = MPlugVideoForClassification(config()).eval()
    ids = torch.randint(8, 100, (2, 3, 7))
    ids[:, :, :3] = ids[:, :1, :3]  # a common question is read once
    ids[0, 1] = ids[0, 0]  # so are equal texts
    starts, lengths = [[2, 3, 1], [3, 4, 6]], [[7, 5, 7], [4, 6, 7]]
    texts = [[row[:end].tolist() for row, end in zip(*own, strict=True)] for own in zip(ids, lengths, strict=True)]
    prefix = model.encode_video(clips()).prefix
    scores = model.score_answers(model.read_prefixes(prefix), texts, starts)
    states = model.read_prefixes(prefix).last_states(texts)
    for row, own in enumerate(texts):
        for answer, text in enumerate(own):
            whole = torch.tensor(text)[None]
            mask = (torch.arange(1, len(text)) >= starts[row][answer]).long()[None]
            losses = model.token_losses(prefix[row, None], whole, mask)
            torch.testing.assert_close(scores[row, answer], -losses.sum())
            torch.testing.assert_close(states[row, answer], model.decode(prefix[row, None], whole)[0, -1])


def test_texts_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MPlugVideoForClassification(config()).eval()
    texts = torch.randint(8, 100, (2, 9, 5)).tolist()
    prefixes = model.read_prefixes(model.encode_video(clips()).prefix)
    together = prefixes.log_likelihoods(texts, [[1] * 9] * 2), prefixes.last_states(texts)
    monkeypatch.setattr(causal_lm, "TOKENS_AT_ONCE", 13)
    monkeypatch.setattr(causal_lm, "WORDS_AT_ONCE", 7)
    torch.testing.assert_close((prefixes.log_likelihoods(texts, [[1] * 9] * 2), prefixes.last_states(texts)), together)


def test_a_frozen_decoder_has_no_gradient_or_dropout(model: MPlugVideoForPreTraining) -> None:
    model.train()
    arguments = clips(), torch.randint(8, 100, (2, 6)), torch.ones(2, 5)
    model(*arguments).backward()
    assert torch.equal(model(*arguments), model(*arguments))
    noisy = MPlugVideoForPreTraining(config(decoder_dropout=True)).train()
    assert not torch.equal(noisy(*arguments), noisy(*arguments))
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.abstractor.queries.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_model_loads_bit_identically(kind: type, tmp_path: Path) -> None:
    model = kind(config())
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.config.class_names == ["a", "b", "c"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_text_embeddings_use_the_last_token_and_unit_length() -> None:
    model = MPlugVideoForRetrieval(config()).eval()
    ids = torch.randint(8, 100, (2, 6))
    padded = F.pad(ids, (0, 3), value=7)
    short, long = model.embed_text(ids, torch.ones(2, 6)), model.embed_text(padded, F.pad(torch.ones(2, 6), (0, 3)))
    torch.testing.assert_close(short, long)
    torch.testing.assert_close(model.embed_video(clips()).norm(dim=1), torch.ones(2))


def test_clips_of_another_shape_are_rejected_with_a_remedy(model: MPlugVideoForPreTraining) -> None:
    with pytest.raises(ValueError, match=r"= \(3, 32, 32\), got \(4, 32, 32\)"):
        model.encode_video(torch.zeros(1, 3, 4, 32, 32))


def test_activation_checkpointing_does_not_change_gradients(model: MPlugVideoForPreTraining) -> None:
    gradients = []
    for parts in ((), ("vision",), ("abstractor", "decoder")):
        model.zero_grad()
        model.train().checkpoint_activations(parts)
        model(clips(), torch.full((2, 6), 9), torch.ones(2, 5)).backward()
        gradients.append(model.vision_encoder.patch_embed.weight.grad.clone())
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0])


def test_compilation_does_not_change_gradients(
    model: MPlugVideoForPreTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the front end of the compiler needs no C compiler and only seconds
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    compiled = deepcopy(model)
    compile_layers(compiled)
    gradients = []
    for found in (model, compiled):
        found.train().checkpoint_activations(("vision",))
        for length in (6, 9):
            found(clips(), torch.full((2, length), 9), torch.ones(2, length - 1)).backward()
        gradients.append({name: p.grad for name, p in found.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_recomputation_does_not_change_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for way in (vision.keep_intermediate, vision.recompute_intermediate):
        monkeypatch.setattr(vision, "recompute_intermediate", way)
        torch.manual_seed(0)
        model = MPlugVideoForPreTraining(config()).train()
        for parameter in model.vision_encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model(clips(), torch.full((2, 6), 9), torch.ones(2, 5)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_the_cpu_linear_layer_matches_torch() -> None:
    layer = Linear(12, 7)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y, expected = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    inputs = (x, layer.weight, layer.bias)
    for found, other in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def test_bf16_agrees_with_fp32(model: MPlugVideoForPreTraining) -> None:
    """The bounds in the README: 1 % of a loss, cosine similarity 0.999 of features and gradients."""
    arguments = clips(), torch.randint(8, 100, (2, 9)), torch.ones(2, 8)
    found = {}
    for precision in ("fp32", "autocast", "bf16"):
        copied = deepcopy(model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss, tokens = copied(*arguments), copied.encode_video(arguments[0]).tokens
        loss.backward()
        found[precision] = (loss.float(), tokens.float().flatten(), copied.abstractor.queries.grad.float().flatten())
    for precision in ("autocast", "bf16"):
        loss, *vectors = found[precision]
        torch.testing.assert_close(loss, found["fp32"][0], rtol=0.01, atol=0)
        for vector, expected in zip(vectors, found["fp32"][1:], strict=True):
            assert torch.nn.functional.cosine_similarity(vector, expected, dim=0) > 0.999
