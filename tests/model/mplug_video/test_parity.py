"""Converted networks match the original code on recorded weights and inputs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from model.mplug_video import (
    MPlugVideoForClassification,
    MPlugVideoForConditionalGeneration,
    MPlugVideoForPreTraining,
    MPlugVideoForRetrieval,
)
from model.mplug_video.decoding import beam_search
from model.mplug_video.processing import answer_mask
from model.tasks.pretraining import contrastive_loss
from model.tasks.retrieval import matching_loss
from tests.helpers.upstream import Recording, grad_norms, mapped_names

CLASSES = {"cls": ["a", "b", "c", "d", "e"]}
KINDS = {
    "pretrain": MPlugVideoForConditionalGeneration,
    "pretrain_connectln_noclip": MPlugVideoForConditionalGeneration,
    "pretrain_contrastive": MPlugVideoForPreTraining,
    "cls": MPlugVideoForClassification,
    "caption": MPlugVideoForConditionalGeneration,
    "caption_prompt": MPlugVideoForConditionalGeneration,
    "retrieval": MPlugVideoForRetrieval,
    "retrieval_itm": MPlugVideoForClassification,
}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max().clamp(max=1)))


def load(name: str, tmp_path: Path) -> tuple[Recording, torch.nn.Module]:
    recording = Recording(name)
    return recording, recording.load(KINDS[name], tmp_path, class_names=CLASSES.get(name))


def losses_and_masks(recording: Recording, model: torch.nn.Module, kind: str, rows: Tensor | None = None) -> Tensor:
    """Checks the loss mask and the unmasked losses; returns their mean with its graph."""
    ids, attention = recording[f"in/{kind}text.input_ids"], recording[f"in/{kind}text.attention_mask"]
    prompts = recording.tensors.get(f"in/{kind}text.prompt_lengths", torch.zeros(len(ids), dtype=torch.long))
    mask = answer_mask(attention, prompts.tolist())
    prefix = model.encode_video(recording["in/image"]).prefix
    losses = model.token_losses(prefix if rows is None else prefix[rows], ids, mask)
    step = {"": "train", "eval_": "eval"}[kind]
    for key in (f"out/{step}.losses", "out/decoder.losses"):
        if key in recording.tensors:
            expected_mask = recording[key.replace("losses", "loss_mask")]
            assert torch.equal(mask, expected_mask[:, -mask.shape[1] :])
            assert not expected_mask[:, : -mask.shape[1]].any()
            close(losses, recording[key][:, -mask.shape[1] :] * mask)
            break
    else:
        raise AssertionError(f"{recording.name} has no recorded losses")
    return losses.sum() / mask.sum()


def check_gradients(recording: Recording, model: torch.nn.Module, folder: Path) -> None:
    names = recording.facts["trainable"]
    close(grad_norms(model, names, folder), recording["out/grad_norms"])
    ours, parameters = mapped_names(folder), dict(model.named_parameters())
    for key, expected in recording.tensors.items():
        if key.startswith("out/grad/"):
            found = parameters[ours[key.removeprefix("out/grad/")]].grad
            close(found.view(expected.shape), expected)


@contextmanager
def gloo_of_one(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def contrastive_as_recorded(video: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """The loss with torch's own gather, which the recording used.

    On gloo (torch 2.13), that gather mixes up non-contiguous gradients, such as the one through `permute` here.
    `contrastive_loss` does not; its gradients are compared with one process that has all clips.
    """
    (all_video,), (all_text,) = all_gather(video), all_gather(text)
    video_to_text = (video[:, None] @ all_text[..., None]).squeeze(-1).amax(dim=-1) / temperature
    text_to_video = (text[:, None, None] @ all_video.permute(0, 2, 1)).squeeze(2).amax(dim=-1) / temperature
    own = torch.arange(len(video))
    return sum(F.cross_entropy(sims, own, label_smoothing=0.1) for sims in (video_to_text, text_to_video)) / 2


@pytest.mark.parametrize("name", KINDS)
def test_trained_and_frozen_parameters(name: str, tmp_path: Path) -> None:
    recording, model = load(name, tmp_path)
    ours = mapped_names(tmp_path / "converted")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {ours[name] for name in recording.facts["trainable"]}
    assert {name for name, _ in model.named_parameters()} - trainable == {ours[n] for n in recording.facts["frozen"]}
    if "trainable_when_freeze_vit" in recording.facts:
        model = KINDS[name].from_pretrained(tmp_path / "converted", freeze_vision=True)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {ours[name] for name in recording.facts["trainable_when_freeze_vit"]}


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("pretrain")])
def test_pretraining(name: str, tmp_path: Path) -> None:
    recording, model = load(name, tmp_path)
    video = model.encode_video(recording["in/image"])
    close(video.tokens, recording["out/image_embeds"])
    close(video.queries, recording["out/image_query"])
    close(video.prefix, recording["out/query_features"])
    ids, mask = recording["in/text.input_ids"], recording["in/text.attention_mask"]
    embeddings = torch.cat((video.prefix, model.decoder.get_input_embeddings()(ids)), dim=1)
    output = model.decoder(inputs_embeds=embeddings, output_hidden_states=True)
    close(output.hidden_states[-1], recording["out/decoder.last_hidden_state"])
    close(output.logits, recording["out/decoder.logits"])
    loss = losses_and_masks(recording, model, "")
    close(loss, recording["out/loss_caption"])
    if name == "pretrain_contrastive":
        states = model.decode(None, ids)
        close(states, recording["out/text_pass.last_hidden_state"])
        features = model.contrastive_features(model.encode_video(recording["in/image"]), ids, mask)
        close(features[0], recording["out/vision_feats"])
        close(features[1], recording["out/text_feat"])
        contrastive = contrastive_loss(*features, model.temperature)
        close(contrastive, recording["out/loss_contrastive"])
        with gloo_of_one(tmp_path):
            contrastive = contrastive_as_recorded(*features, model.temperature)
            close(contrastive, recording["out/loss_contrastive"])
            (loss + contrastive).backward()
        check_gradients(recording, model, tmp_path / "converted")
        return
    close(loss, recording["out/loss"])
    loss.backward()
    check_gradients(recording, model, tmp_path / "converted")


def unpadded(recording: dict[str, Tensor], name: str, clips: int) -> list[list[list[int]]]:
    """The texts of each clip, as token IDs without padding."""
    ids, mask = recording[f"{name}.input_ids"], recording[f"{name}.attention_mask"]
    rows = [row[: int(own.sum())].tolist() for row, own in zip(ids, mask, strict=True)]
    count = len(rows) // clips
    return [rows[clip * count : (clip + 1) * count] for clip in range(clips)]


def texts_and_starts(recording: dict[str, Tensor], clips: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The texts of an evaluation, and in each the number of the answer's first token."""
    starts = 1 + recording["in/eval_text.prompt_lengths"].view(clips, -1)
    return unpadded(recording, "in/eval_text", clips), starts.tolist()


def test_classification(tmp_path: Path) -> None:
    recording, model = load("cls", tmp_path)
    generation = losses_and_masks(recording, model, "")
    close(generation, recording["out/train.loss_generation"])
    prefix = model.encode_video(recording["in/image"]).prefix
    title = (recording["in/prompt_text.input_ids"], recording["in/prompt_text.attention_mask"])
    logits = model.classify(prefix, *title)
    close(logits, recording["out/train.cls_logits"])
    close(model(recording["in/image"], *title), recording["out/train.cls_logits"])
    head = F.cross_entropy(logits, recording["in/labels"])
    close(head, recording["out/train.loss_cls"])
    (generation + head).backward()
    check_gradients(recording, model, tmp_path / "converted")

    texts, starts = texts_and_starts(recording, len(prefix))
    scores = model.score_answers(model.read_prefixes(prefix), texts, starts)
    close(scores, recording["out/eval.scores"])
    close(scores.softmax(dim=1), recording["out/eval.generation_logits"])
    close(model.classify(prefix, *title), recording["out/eval.cls_logits"])


def test_matching(tmp_path: Path) -> None:
    recording, model = load("retrieval_itm", tmp_path)
    assert model.config.class_names == ["否", "是"]
    images = recording["in/image"]
    rows = torch.cat((torch.arange(len(images)), recording["in/negative_indices"]))
    generation = losses_and_masks(recording, model, "", rows)
    close(generation, recording["out/train.loss_generation"])
    prefix = model.encode_video(images).prefix
    titles = (recording["in/prompt_text.input_ids"], recording["in/prompt_text.attention_mask"])
    logits = model.classify(prefix[rows], *titles)
    close(logits, recording["out/train.cls_logits"])
    head = F.cross_entropy(logits, recording["in/labels"])
    close(head, recording["out/train.loss_cls"])
    (generation + head).backward()
    check_gradients(recording, model, tmp_path / "converted")

    prefixes = model.read_prefixes(prefix)
    scores = model.score_answers(prefixes, *texts_and_starts(recording, len(images)))
    close(scores, recording["out/eval.generation_logits"])
    titles = unpadded(recording, "in/eval_prompt_text", len(images))
    with torch.no_grad():
        close(model.classify_texts(prefixes, titles).softmax(dim=2)[..., 1], recording["out/eval.cls_logits"])


def test_retrieval(tmp_path: Path) -> None:
    recording, model = load("retrieval", tmp_path)
    text = (recording["in/text.input_ids"], recording["in/text.attention_mask"])
    video_features, text_features = model(recording["in/image"], *text)
    loss = matching_loss(video_features, text_features, recording["in/idx"], model.temperature)
    close(loss, recording["out/loss"])
    close(video_features, recording["out/vision_feats"])
    close(text_features, recording["out/text_feat"])
    close(video_features, recording["out/eval.vision_feats"])
    evaluation = (recording["in/eval_text.input_ids"], recording["in/eval_text.attention_mask"])
    close(model.embed_text(*evaluation), recording["out/eval.text_feats"])
    close(video_features @ model.embed_text(*evaluation).T, recording["out/eval.sims_v2t"])
    loss.backward()
    check_gradients(recording, model, tmp_path / "converted")


@pytest.mark.parametrize("name", ["caption", "caption_prompt"])
def test_caption_training(name: str, tmp_path: Path) -> None:
    recording, model = load(name, tmp_path)
    close(model.encode_video(recording["in/image"]).prefix, recording["out/query_features"])
    loss = losses_and_masks(recording, model, "")
    close(loss, recording["out/train.loss"])
    loss.backward()
    check_gradients(recording, model, tmp_path / "converted")


@pytest.mark.parametrize("name", ["caption", "caption_prompt"])
def test_all_hypotheses_of_the_released_beam_search(name: str, tmp_path: Path) -> None:
    recording, model = load(name, tmp_path)
    end, width = recording.facts["generation"]["stop_token"], recording["out/beam5.sequences"].shape[1]
    length = int(recording["in/gen_prompt_length"][0])
    prompt = recording["in/gen_text.input_ids"][:, :length]
    prefix = model.encode_video(recording["in/image"]).prefix
    embeddings = torch.cat((prefix, model.decoder.get_input_embeddings()(prompt)), dim=1)
    for beams in (1, 3, 5):
        found = beam_search(
            model.decoder, embeddings, num_beams=beams, max_new_tokens=width - length, width=width, end=end
        )
        for row, hypotheses in enumerate(found):
            sequences = recording[f"out/beam{beams}.row{row}.all_sequences"]
            padded = [
                [*prompt[row].tolist(), *ids, *[end] * (width - length - len(ids))] for _, ids in hypotheses.found
            ]
            assert padded == sequences.tolist()
            close(
                torch.tensor([score for score, _ in hypotheses.found]),
                recording[f"out/beam{beams}.row{row}.all_scores"],
            )
    written = model.generate(recording["in/image"], prompt, num_beams=5, max_new_tokens=width - length)
    expected = recording["out/beam5.sequences"][:, length:]
    assert F.pad(written, (0, expected.shape[1] - written.shape[1]), value=end).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["caption", "caption_prompt"])
def test_greedy_and_text_only_decoding(name: str, tmp_path: Path) -> None:
    recording, model = load(name, tmp_path)
    end = recording.facts["generation"]["stop_token"]
    length = int(recording["in/gen_prompt_length"][0])
    prompt = recording["in/gen_text.input_ids"][:, :length]
    new = recording.facts["generation"]["tokens_to_generate"]
    written = model.generate(recording["in/image"], prompt, do_sample=False, max_new_tokens=new)
    for row, ids in enumerate(written.tolist()):
        expected = recording[f"out/greedy.row{row}"][0, length:].tolist()
        upto = ids.index(end) + 1 if end in ids else len(ids)
        assert ids[:upto] == expected[: expected.index(end) + 1 if end in expected else len(expected)]

    expected = recording["out/textonly_beam3.sequences"]
    embeddings = model.decoder.get_input_embeddings()(prompt[:1])
    (found,) = beam_search(model.decoder, embeddings, num_beams=3, max_new_tokens=new, width=length + new, end=end)
    score, ids = found.found[0]
    assert [*ids, *[end] * (new - len(ids))] == expected[0, length:].tolist()
    close(torch.tensor([score]), recording["out/textonly_beam3.scores"])


@pytest.mark.parametrize("case", ["pretrain_contrastive", "retrieval"])
def test_two_processes(case: str, tmp_path: Path) -> None:
    recording = Recording("two_ranks")
    folder = Recording(case).convert(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, "-m", "tests.helpers.gathered_losses", case, str(folder)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for rank in (0, 1):
        found = load_file(folder / f"{case}.rank{rank}.safetensors")
        for name in ("loss", "loss_caption", "loss_contrastive"):
            if name in found:
                close(found[name], recording[f"out/{case}.rank{rank}.{name}"])
        if case == "pretrain_contrastive":
            close(found["mean_grad_norms"], whole_batch_grad_norms(recording, folder))
        else:
            close(found["grad_norms"], recording[f"out/{case}.rank{rank}.grad_norms"])
            close(found["mean_grad_norms"], recording[f"out/{case}.mean_grad_norms"])


def whole_batch_grad_norms(recording: Recording, folder: Path) -> Tensor:
    """Gradients of the contrastive loss with the clips of both processes in one process."""
    model = MPlugVideoForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    images, ids, mask = (
        torch.cat([recording[key.format(rank)] for rank in (0, 1)])
        for key in (
            "in/rank{}.image",
            "in/pretrain_contrastive.rank{}.input_ids",
            "in/pretrain_contrastive.rank{}.attention_mask",
        )
    )
    features = model.contrastive_features(model.encode_video(images), ids, mask)
    contrastive_loss(*features, model.temperature).backward()
    return grad_norms(model, recording.facts["names.pretrain_contrastive.names"], folder)
