"""Trains a GPT-3 style tokenizer on the titles of the corpus."""

from components.image import component


@component()
def train_tokenizer(
    raw: str, raw_version: str, root: str, vocab_size: int, tracking: dict[str, str], code_version: str
) -> str:
    """Returns the URI of the tokenizer, <root>/models/tokenizer/<version>. `raw_version` must change with the data."""
    from model.tasks.language_modeling import publish_tokenizer
    from model.tracking import stage

    facts = {"vocab_size": vocab_size, "raw_version": raw_version, "code_version": code_version}
    with stage("tokenizer", tracking, facts):
        return publish_tokenizer(raw, root, vocab_size)
