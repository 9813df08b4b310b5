import torch

from model.config.load import load_config
from model.data.loading.loader import ClipSource
from model.data.shards.reader import ShardReader
from model.tasks.build import build_task


def test_negatives_are_titles_of_other_clips(shards: dict[str, str], decoder: str) -> None:
    settings = [
        f"data.shards={shards['retrieval']}",
        f"model.decoder={decoder}",
        "task=matching",
        "data.max_length=80",
    ]
    task = build_task(load_config("tiny_retrieval", settings))
    clips = ClipSource(reader=ShardReader(f"{shards['retrieval']}/train"), processor=task.processor)
    examples = [clips.example((0, position), clips.fetch(position)) for position in (0, 1, 1, 2)]  # the same clip twice
    batch = task.collate(examples)
    tokenizer = task.processor.tokenizer
    titles = tokenizer.batch_decode(batch["title_ids"], skip_special_tokens=True)
    questions = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    own = [example.annotation.text for example in examples]
    for clip, label, title, question in zip(
        batch["clips"].tolist(), batch["labels"].tolist(), titles, questions, strict=True
    ):
        assert (title == own[clip]) == bool(label)
        assert question == f"标题：{title} 这个视频与标题匹配吗？{'是' if label else '否'}"
    assert batch["labels"].tolist() == [1] * 4 + [0] * 8
    assert batch["clips"].tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]

    loss, _ = task.network(batch)
    loss.backward()
    assert task.model.classifier[0].weight.grad.abs().sum() > 0

    task.model.eval()
    task.read_split([example.annotation for example in examples])
    predictions = task.network(task.collate_evaluation(examples), predict=True)
    assert all(len(row["head_scores"]) == len(row["generation_scores"]) == 4 for row in predictions)
    prefix = task.model.encode_video(task.normalize(batch)["pixel_values"]).prefix
    with torch.no_grad():
        head = task.model.classify(prefix, batch["title_ids"][:4], batch["title_mask"][:4]).softmax(dim=1)[:, 1]
    found = torch.tensor([row["head_scores"][number] for number, row in enumerate(predictions)])
    torch.testing.assert_close(found, head, rtol=1e-5, atol=1e-6)
