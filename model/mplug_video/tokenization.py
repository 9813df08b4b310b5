"""The GPT-3 tokenizer: byte-level BPE with `<sep>` as begin token and `<|endoftext|>` as end and padding token.

Sentences are encoded as begin + text + end, pairs as begin + prompt + answer + end. Chinese text is not segmented into
words, as for the released models.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, NEW_LINE = "<sep>", "<|endoftext|>", "\n"
SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", BEGIN, NEW_LINE, END]


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of the GPT-3 kind on `texts`, with at most `vocab_size` tokens, of which 264 are fixed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Reads a ModelScope GPT-3 `tokenizer.json`."""
    return _wrap(Tokenizer.from_file(str(path)))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def with_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds begin and padding tokens to the tokenizer of another decoder, if missing: its end token is used for both."""
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode_sentence(tokenizer: PreTrainedTokenizerFast, text: str, max_length: int) -> list[int]:
    """begin + text + end, truncated on the right to `max_length`. A truncated sentence has no end token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:max_length]


def encode_pair(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str, max_length: int) -> tuple[list[int], int]:
    """begin + prompt + answer + end, and the number of prompt tokens; see `encode_choices`."""
    (ids,), (length,) = encode_choices(tokenizer, prompt, [answer], max_length)
    return ids, length


def encode_choices(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answers: list[str], max_length: int
) -> tuple[list[list[int]], list[int]]:
    """begin + prompt + answer + end for each answer, and the numbers of prompt tokens.

    If the pair is too long, the end of the prompt is cut off. The answer is only cut if it would not fit alone.
    """
    whole_prompt, *encoded = tokenizer([prompt, *answers], add_special_tokens=False).input_ids
    rows, lengths, room = [], [], max_length - 2
    for answer_ids in encoded:
        if len(answer_ids) <= room:
            prompt_ids = whole_prompt[: room - len(answer_ids)]
        else:
            prompt_ids = whole_prompt[:room]
            answer_ids = answer_ids[: room - len(prompt_ids)]
        rows.append([tokenizer.bos_token_id, *prompt_ids, *answer_ids, tokenizer.eos_token_id])
        lengths.append(len(prompt_ids))
    return rows, lengths
