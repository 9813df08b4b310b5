"""Zero-shot evaluation of both families, on real shards and models that were trained for two steps."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config.load import load_config
from model.data.annotations import Annotation
from model.data.loading.loader import Batch, ClipSource, Example
from model.data.shards.reader import ShardReader
from model.errors import ConfigError, DataError
from model.evaluation.runner import evaluate_model
from model.mplug_owl_video import MplugOwlProcessor
from model.tasks.build import build_task
from model.tasks.captioning import Captioning
from model.tasks.zero_shot import (
    BENCHMARKS,
    PROMPTS,
    ZeroShot,
    ZeroShotClassification,
    build_zero_shot,
    named_category,
    zero_shot_config,
)
from tests.helpers.paths import MPLUG

FAMILIES = ["mplug_video", "mplug-owl"]


@pytest.fixture(scope="module")
def models(pretrained: str, instructed: str) -> dict[str, str]:
    return {"mplug_video": pretrained, "mplug-owl": instructed}


def asked(model: str, shards: str, prompt: str = "", split: str = "test") -> tuple[ZeroShot, ShardReader]:
    task, reader = (
        build_zero_shot(zero_shot_config(model, shards), prompt),
        ShardReader(f"{shards}/{split}"),
    )
    task.model.float()
    task.read_split(list(reader.annotations()))
    return task, reader


def examples_of(task: ZeroShot, reader: ShardReader, positions: list[int]) -> list[Example]:
    source = ClipSource(reader=reader, processor=task.processor)
    return [source.example((0, position), source.fetch(position)) for position in positions]


def batch_of(task: ZeroShot, reader: ShardReader, positions: list[int]) -> Batch:
    return task.normalize(task.collate_evaluation(examples_of(task, reader, positions)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dataset", ["classification", "captioning"])
def test_answers_do_not_depend_on_the_batch(
    family: str, dataset: str, models: dict[str, str], shards: dict[str, str]
) -> None:
    task, reader = asked(models[family], shards[dataset])
    task.max_new_tokens = 6
    together = task.predict(batch_of(task, reader, [0, 1, 2, 3]))
    for position, row in enumerate(together):
        (alone,) = task.predict(batch_of(task, reader, [position]))
        assert alone.pop("generation_scores", []) == pytest.approx(row.pop("generation_scores", []), rel=1e-4)
        assert alone == row


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_the_whole_text(family: str, models: dict[str, str], shards: dict[str, str]) -> None:
    """The prompt with each name is read at once, without the cache of the prompt."""
    task, reader = asked(models[family], shards["classification"])
    batch = batch_of(task, reader, [0])
    with torch.no_grad():
        prompts = task.family.embed(batch)
        task.max_new_tokens = 1
        (row,) = task.answer(prompts, batch["annotations"])
        decoder = task.family.decoder
        for answer, score in zip(map(torch.tensor, task.answers), row["generation_scores"], strict=True):
            whole = torch.cat((prompts.embeddings, decoder.get_input_embeddings()(answer[None])), dim=1)
            logits = decoder(inputs_embeds=whole).logits[0, -1 - len(answer) : -1].log_softmax(dim=-1)
            expected = float(logits.gather(1, answer[:, None]).sum())
            assert score == pytest.approx(expected, rel=1e-4)


def test_the_released_prompt_scores_as_the_fine_tuned_task_does(pretrained: str, shards: dict[str, str]) -> None:
    settings = [f"model.init_from={pretrained}", f"data.shards={shards['classification']}", "data.max_length=80"]
    tuned = build_task(load_config("tiny_classification", settings))
    tuned.model.eval()
    task, reader = asked(pretrained, shards["classification"])
    expected = tuned.predict(tuned.normalize(tuned.collate_evaluation(examples_of(task, reader, [0, 1, 2]))))
    for before, row in zip(expected, task.predict(batch_of(task, reader, [0, 1, 2])), strict=True):
        assert row["generation_scores"] == pytest.approx(before["generation_scores"], rel=1e-4)


def test_a_question_reaches_the_chat_model_as_in_training(instructed: str, shards: dict[str, str]) -> None:
    task, reader = asked(instructed, shards["instruction"])
    annotation = reader.annotation(0)
    processor = MplugOwlProcessor.from_pretrained(instructed)
    ids = batch_of(task, reader, [0])["input_ids"][0].tolist()
    assert ids == processor.encode_chat(annotation.conversation[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_benchmark_is_scored(family: str, models: dict[str, str], shards: dict[str, str]) -> None:
    for dataset, prompts in PROMPTS[family].items():
        found = evaluate_model(models[family], shards=shards[dataset], overrides=["data.workers=0"], zero_shot=True)
        assert found.scores.keys() >= set(BENCHMARKS[dataset].metrics)
        assert found.chance.keys() <= found.scores.keys()
        assert len(found.predictions) == len(found.captions) == len(ShardReader(f"{shards[dataset]}/val"))
        name, text = next(iter(prompts.items()))
        assert found.protocol.items() >= {"prompt": name, "prompt_text": text, "split": "val"}.items()


def test_the_command_prints_scores_and_protocol(instructed: str, shards: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    options = ["--zero-shot", "--prompt", "brief", "--out", str(out), "--tracking-uri", "", "data.workers=0"]
    command = [MPLUG, "evaluate", instructed, shards["instruction"], *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert found["scores"] == json.loads(ended.stdout)
    line = next(line for line in ended.stderr.splitlines() if line.startswith("data: instruction@"))
    assert "; split: val; " in line
    assert (
        "; frames: 4, the middle ones of equal intervals; image_size: 64; precision: float32; prompt: brief; " in line
    )
    assert "; prompt_text: {text}请用一个词回答。; decoding: greedy, at most " in line


def test_wrong_requests_are_refused(pretrained: str, decoder: str, shards: dict[str, str]) -> None:
    for model, dataset, prompt, message in (
        (pretrained, "classification", "x", r"--prompt must be one of title, video for classification, got x\."),
        (pretrained, "retrieval", "", "--zero-shot needs shards of classification, captioning, instruction, but"),
        (
            decoder,
            "captioning",
            "",
            "must be an mPLUG-Owl model, which .* or an mPLUG-Video model, but its type is gpt2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_model(model, shards=shards[dataset], zero_shot=True, prompt=prompt)


def test_an_mplug_video_reads_all_turns_about_one_video(pretrained: str, shards: dict[str, str]) -> None:
    task, reader = asked(pretrained, shards["instruction"])
    show, red, what, where = (
        {"type": "video", "video": "a.mp4"}, {"type": "text", "text": "红色"},
        {"type": "text", "text": "什么？"}, {"type": "text", "text": "哪里？"},
    )  # fmt: skip
    turns = [("user", [show, what]), ("assistant", [red]), ("user", [where]), ("assistant", [red])]
    text = json.dumps([{"role": role, "content": parts} for role, parts in turns])
    task.read_split([annotation := Annotation(video="a.mp4", text=text)])
    (example,) = [replace(example, annotation=annotation) for example in examples_of(task, reader, [0])]
    ids = task.collate_evaluation([example])["input_ids"][0].tolist()
    assert task.processor.tokenizer.decode(ids[1:]) == "问题：什么？ 答案： 红色 问题：哪里？ 答案："
    image = text.replace('{"type": "video", "video": "a.mp4"}', '{"type": "image", "image": "a.png"}')
    with pytest.raises(DataError, match=r"questions about one video, but a conversation has image: 问题：哪里？"):
        task.read_split([Annotation(video="a.png", text=image)])


def test_a_prompt_that_leaves_no_room_is_refused(pretrained: str, shards: dict[str, str]) -> None:
    task, reader = asked(pretrained, shards["classification"])
    task.template = "类目" * 200
    with pytest.raises(DataError, match="a conversation must have fewer than 128 tokens, but this one has"):
        task.read_split(list(reader.annotations()))


def test_missing_weights_are_an_error(pretrained: str, shards: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pretrained, folder, ignore=shutil.ignore_patterns("manifest.json"))
    weights = load_file(folder / "model.safetensors")
    del weights["abstractor.queries"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"must hold every weight of its config\.json, abstractor\.queries is missing"
    ):
        build_zero_shot(zero_shot_config(str(folder), shards["captioning"]), "")


NAMES = ["电影", "电影剪辑", "动漫"]


@pytest.mark.parametrize(
    ("answer", "category"),
    [
        ("电影。", "电影"),
        ("这个视频属于电影剪辑类", "电影剪辑"),
        ("动漫或者电影剪辑", ""),
        ("电影剪辑、电影", ""),
        ("体育", ""),
        ("", ""),
    ],
)
def test_the_category_that_an_answer_names(answer: str, category: str) -> None:
    assert named_category(answer, NAMES) == category


def test_empty_answers_are_wrong() -> None:
    rows = [
        {"label": "电影", "prediction": "", "generation_scores": [0.0, -1.0, -2.0]},
        {"label": "动漫", "prediction": "动漫", "generation_scores": [0.0, -1.0, -2.0]},
    ]
    scores = ZeroShotClassification.score(rows, NAMES)
    assert scores == {"generation_top1": 0.5, "generation_top5": 1.0, "written_top1": 0.5}
    empty = [{"video": "a", "prediction": "", "references": ["小猫"]}]
    assert all(value == pytest.approx(0, abs=1e-6) for value in Captioning.score(empty, []).values())
