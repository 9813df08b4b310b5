"""Training with decoders of other families, selected by `model.decoder`."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from model import manifest
from model.config.load import load_config
from model.data.loading.loader import ClipSource, Example
from model.data.shards.reader import ShardReader
from model.mplug_video.processing import answer_mask
from model.tasks.build import build_task
from tests.helpers.upstream import GPT3

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 320, "bos_token_id": None, "eos_token_id": 7}
ATTENTION = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
FAMILIES = {
    "qwen2": {**SIZES, **ATTENTION, "num_hidden_layers": 2},
    "qwen3": {**SIZES, **ATTENTION, "num_hidden_layers": 2, "head_dim": 8},
    "llama": {**SIZES, **ATTENTION, "num_hidden_layers": 2},
    "bloom": {**SIZES, "n_layer": 2},
}


def decoder_folder(family: str, folder: Path) -> str:
    """A random decoder whose tokenizer has only an end token, like Qwen's."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(GPT3 / "tokenizer.json")), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    (folder / manifest.FILE).write_bytes(manifest.describe_folder(folder))
    return str(folder)


def examples(shards: str, task: object, count: int) -> list[Example]:
    clips = ClipSource(reader=ShardReader(f"{shards}/train"), processor=task.processor)
    return [clips.example((0, position), clips.fetch(position)) for position in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_and_captions(family: str, shards: dict[str, str], tmp_path: Path) -> None:
    line = f"model.decoder={decoder_folder(family, tmp_path / 'decoder')}"
    task = build_task(
        load_config("tiny_captioning", [line, f"data.shards={shards['captioning']}", "data.max_length=24"])
    )
    task.model.train()
    rows = examples(shards["captioning"], task, 3)
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss, _ = task.network(task.collate(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in task.model.decoder.parameters())

    task.model.eval()
    predictions = task.network(task.collate_evaluation(rows), predict=True)
    assert [row["video"] for row in predictions] == [row.annotation.video for row in rows]
    assert all(isinstance(row["prediction"], str) for row in predictions)
    task.model.save_pretrained(tmp_path / "model")
    task.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / manifest.FILE).write_bytes(manifest.describe_folder(tmp_path / "model"))
    settings = [f"model.init_from={tmp_path / 'model'}", "data.shards=s", "data.max_length=24"]
    again = build_task(load_config("tiny_captioning", settings))
    again.model.eval()
    assert again.network(again.collate_evaluation(rows), predict=True) == predictions


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_share_a_common_prefix(family: str, shards: dict[str, str], tmp_path: Path) -> None:
    line = f"model.decoder={decoder_folder(family, tmp_path / 'decoder')}"
    task = build_task(load_config("tiny_classification", [line, f"data.shards={shards['classification']}"]))
    task.model.eval()
    batch = task.collate_evaluation(examples(shards["classification"], task, 2))
    with torch.no_grad():
        prefix = task.model.encode_video(task.normalize(batch)["pixel_values"]).prefix
        for row in range(2):
            read = task.model.read_prefixes(prefix[row, None])
            texts, starts = batch["answers"][row], batch["answer_starts"][row]
            scores = task.model.score_answers(read, [texts], [starts])[0]
            ids, attention = task.processor.pad(texts)
            mask = answer_mask(attention, [start - 1 for start in starts])
            repeated = prefix[row, None].expand(len(ids), -1, -1)
            torch.testing.assert_close(
                scores, -task.model.token_losses(repeated, ids, mask).sum(dim=1), rtol=1e-5, atol=1e-4
            )
