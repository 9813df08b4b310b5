"""Instruction tuning: batches, what is trained, exports, scores; and the real commands with two processes."""

import json
from pathlib import Path

import pytest
import torch

from model import manifest
from model.config.load import load_config
from model.data.annotations import Annotation, conversation_annotation
from model.data.loading.loader import ClipSource, Example
from model.data.shards.reader import ShardReader
from model.errors import ConfigError, DataError
from model.evaluation.registration import register_candidates
from model.evaluation.results import save_evaluation
from model.evaluation.runner import evaluate_model
from model.mplug_owl_video import MplugOwlForConditionalGeneration, MplugOwlProcessor
from model.registry import find_champion
from model.tasks.base import Task
from model.tasks.build import build_task
from model.tasks.instruction import Instruction
from tests.helpers.running import train

FROZEN = ["model.freeze_vision=true", "model.freeze_abstractor=true"]


@pytest.fixture(scope="module")
def settings(shards: dict[str, str], instructed: str) -> list[str]:
    """LoRA on the decoder of a model, with a trained visual side."""
    lora = ["model.lora.rank=4", "model.freeze_decoder=true"]
    return [*lora, f"model.init_from={instructed}", f"data.shards={shards['instruction']}", "training.precision=fp32"]


def built(settings: list[str], *changes: str) -> Task:
    task = build_task(load_config("tiny_instruction", [*settings, *changes]))
    task.model.train()
    return task


def examples(task: Task, count: int) -> list[Example]:
    source = ClipSource(reader=ShardReader(f"{task.config.data.shards}/train"), processor=task.processor)
    return [source.example((0, position), source.fetch(position)) for position in range(count)]


def spoken(text: str) -> Annotation:
    return conversation_annotation(json.dumps({"text": text}))


def trained(task: Task) -> set[str]:
    return {name for name, weights in task.model.named_parameters() if weights.requires_grad}


def test_the_configuration_selects_what_is_trained(settings: list[str]) -> None:
    only_lora = trained(built(settings, *FROZEN))
    assert only_lora
    assert all("lora_" in name and name.startswith("language_model.") for name in only_lora)
    with_abstractor = trained(built(settings, "model.freeze_vision=true")) - only_lora
    assert {name.split(".")[0] for name in with_abstractor} == {"abstractor", "query_tokens", "temporal_query_tokens"}
    whole = built(settings, "model.lora.rank=0", "model.freeze_decoder=false")
    assert trained(whole) == {name for name, _ in whole.model.named_parameters()}


@pytest.mark.parametrize(("changes", "is_random"), [(FROZEN, False), ([], True)])
def test_frozen_parts_have_no_dropout(settings: list[str], changes: list[str], is_random: bool) -> None:
    task = built(settings, *changes)
    task.model.abstractor.encoder.layers[0].crossattention.dropout = 0.5
    batch = task.collate(examples(task, 2))
    losses = [float(task.network(batch)[0].detach()) for _ in range(2)]
    assert (losses[0] != losses[1]) is is_random


def test_a_batch_without_media_uses_all_trained_weights(settings: list[str]) -> None:
    """Otherwise processes that read other media would wait for each other's gradients."""
    task = built(settings)
    text = Example(annotation=spoken("Human: 红色？\nAI: 小猫"), media=[], seed="")
    loss, _ = task.network(task.collate([text, text]))
    loss.backward()
    missing = [
        name for name, weights in task.model.named_parameters() if weights.requires_grad and weights.grad is None
    ]
    assert missing == []


def test_a_row_is_independent_of_its_batch(settings: list[str]) -> None:
    task = built(settings)
    rows = [*examples(task, 2), Example(annotation=spoken("Human: 红色？\nAI: 小猫"), media=[], seed="")]
    together = task.collate(rows)
    media = task.encode_media(task.normalize(together))
    losses = task.model.token_losses(together["input_ids"], together["loss_mask"], media).sum(dim=1)
    for row, loss in zip(rows, losses, strict=True):
        alone = task.normalize(task.collate([row]))
        own = task.model.token_losses(alone["input_ids"], alone["loss_mask"], task.encode_media(alone)).sum()
        assert float(own.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)


def test_an_answer_that_does_not_fit_is_an_error(settings: list[str]) -> None:
    task = built(settings, "data.max_length=16")
    with pytest.raises(DataError, match=r"an answer within data\.max_length = 16 tokens, but this one has none"):
        task.collate(examples(task, 1))


def test_a_preset_of_another_size_is_refused(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vision\.image_size must be that of .*, 64, got 32"):
        built(settings, "model.vision.image_size=32")


def answered(question_type: str, prediction: str, reference: str) -> dict[str, object]:
    return {"question_type": question_type, "prediction": prediction, "references": [reference]}


PREDICTIONS = [
    answered("colour", "红色。", "红色"),
    answered("colour", " 蓝色", "蓝色"),
    answered("colour", "", "红色"),
    answered("what", "Cat", "cat"),
    answered("", "很好", "不好"),
]


def test_scores_by_question_type() -> None:
    scores = Instruction.score(PREDICTIONS, [])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["accuracy_colour"] == pytest.approx(2 / 3)
    assert scores["accuracy_what"] == 1
    assert scores.keys() == {"accuracy", "accuracy_colour", "accuracy_what", "rouge_l"}


def test_chance_is_the_most_frequent_answer_of_a_type() -> None:
    chance = Instruction.chance(PREDICTIONS, [])
    assert chance == pytest.approx({"accuracy": 4 / 5, "accuracy_colour": 2 / 3, "accuracy_what": 1})


@pytest.fixture(scope="module")
def tuned(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a model with LoRA and a trained visual side, trained by two processes."""
    root = tmp_path_factory.mktemp("instruction")
    return train("tiny_instruction", root, settings, processes=2)


def test_a_tuned_model_is_published_with_merged_weights(tuned: str) -> None:
    folder = manifest.fetch_folder(tuned)
    model = MplugOwlForConditionalGeneration.from_pretrained(folder)
    assert not any("lora" in name for name in model.state_dict())
    processor = MplugOwlProcessor.from_pretrained(folder)
    config = load_config("tiny_instruction", ["data.shards=s", "model.decoder=d"])
    assert (processor.num_frames, processor.system) == (config.model.vision.num_frames, config.model.system)


def test_lora_alone_is_published_as_an_adapter_too(settings: list[str], instructed: str, tmp_path: Path) -> None:
    again = Path(train("tiny_instruction", tmp_path, [*settings, *FROZEN, "optim.lr=0.01"]))
    adapter = json.loads((again / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == instructed
    before, after = (MplugOwlForConditionalGeneration.from_pretrained(folder) for folder in (instructed, again))
    changed = {
        name for name, weights in after.state_dict().items() if not torch.equal(weights, before.state_dict()[name])
    }
    assert changed
    assert all(name.endswith("self_attention.query_key_value.weight") for name in changed)


def test_an_evaluated_model_is_registered(tuned: str, shards: dict[str, str], tmp_path: Path) -> None:
    evaluation = evaluate_model(
        tuned, shards=shards["instruction"], split="test", overrides=["data.workers=0"], with_untuned=True
    )
    assert len(evaluation.predictions) == len(ShardReader(shards["instruction"] + "/test"))
    assert evaluation.untuned.keys() == evaluation.scores.keys()
    assert {row["question_type"] for row in evaluation.predictions} >= {"what", "colour", "where", "direction"}
    assert all(row["question"] and row["references"][0] for row in evaluation.predictions)
    where = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "test", "pipeline": ""}
    uri = save_evaluation(evaluation, str(tmp_path / "evaluation"))
    assert register_candidates([uri], where, "1") == ["mplug-video-instruction/1"]
    assert find_champion(where["uri"], "mplug-video-instruction") is None
