"""Trains GPT-3 style tokenizers on the texts of the corpus."""

from components.image import component


@component()
def train_tokenizer(
    raw: str,
    raw_version: str,
    root: str,
    datasets: list[str],
    vocab_size: int,
    tracking: dict[str, str],
    code_version: str,
) -> dict[str, str]:
    """Returns the URI of the tokenizer of each dataset. `raw_version` must change with the data."""
    from model.tasks.language_modeling import publish_tokenizer
    from model.tracking import stage

    facts = {"vocab_size": vocab_size, "raw_version": raw_version, "code_version": code_version}
    with stage("tokenizer", tracking, facts):
        return {dataset: publish_tokenizer(raw, root, vocab_size, dataset) for dataset in datasets}
