"""A GPT-3 style tokenizer for a corpus, learned on its titles. The published models bring their own."""

import tempfile
from pathlib import Path

from model import manifest, storage
from model.data.annotations import read_annotations
from model.mplug_video.processing import clean_caption
from model.mplug_video.tokenization import train_tokenizer
from model.tasks.pretraining import MAX_WORDS


def publish_tokenizer(raw: str, root: str, vocab_size: int) -> str:
    """Learns on the pre-training titles below `raw`; returns <root>/models/tokenizer/<version>."""
    titles = [clean_caption(row.text, MAX_WORDS) for row in read_annotations(raw, "pretrain", "train")]
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(titles, vocab_size).save_pretrained(folder)
        return manifest.publish_folder(Path(folder), storage.join(root, "models", "tokenizer"), vocab_size=vocab_size)
