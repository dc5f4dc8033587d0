"""Tokenizers as files of a model folder, and the token ids of a text for its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from rabit_jax.errors import BadInput, first_line
from rabit_jax.models.config import ModelConfig
from rabit_jax.types import Tokenizer

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def save_tokenizer(tokenizer: Tokenizer | tokenizers.Tokenizer, folder: str | Path) -> None:
    """Writes the tokenizer's files into `folder`, as transformers names them.

    Args:
      tokenizer: of transformers, or a plain `tokenizers.Tokenizer`.
      folder: where to write.
    """
    from tokenizers import Tokenizer as PlainTokenizer
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PlainTokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a local model folder, None if the folder has none.

    Where there is a tokenizer.json, it alone decides the ids, whatever class tokenizer_config.json
    names: several classes of transformers replace the file's normaliser and word pattern by their
    own. Code that comes with a model is never run.

    Raises:
      BadInput: the folder has tokenizer files that transformers cannot read.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        return None
    # Without an answer of ours, tokenizers warns whenever the process starts another.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    whole = (Path(folder) / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if whole else AutoTokenizer
    try:
        found = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # damaged files surface as many types, panics of Rust among them
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise BadInput(
            f"cannot read the tokenizer in {str(folder)!r} ({first_line(error)}); restore its "
            "tokenizer.json"
        ) from error
    if not isinstance(found.model_max_length, int | float):
        raise BadInput(f"model_max_length in {Path(folder) / 'tokenizer_config.json'} is "
                       f"{found.model_max_length!r}, wanted a number: correct it")
    return found


def read_tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer | None:
    """`load_tokenizer`, checked against the vocabulary of the model beside it.

    A tokenizer that names no end token gets the model's first one as far as it has it, for texts
    are joined by that token.

    Raises:
      BadInput: its files cannot be read, or it makes tokens that the model does not have.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    added = tokenizer.get_added_vocab()
    # Gemma 3 1B's own tokenizer has a placeholder for images beyond the model's vocabulary. An
    # added token is harmless if it neither begins nor ends a text nor is in the chat template.
    used = f"{tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.chat_template}"
    for token, i in tokens_beyond(tokenizer, config.vocab_size).items():
        if token not in added or token in used:
            raise BadInput(f"the tokenizer in {folder} has the token {token!r} with id {i}, "
                           f"{_ends_at(config.vocab_size)}: put the tokenizer of this model there")
    if tokenizer.eos_token_id is None:
        names = [tokenizer.convert_ids_to_tokens(i) for i in config.eos_ids]
        tokenizer.eos_token = next((name for name in names if name), None)
    return tokenizer


def tokens_beyond(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """The tokens, with their ids, that have no row in a table of `vocab_size`; by falling id."""
    found = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def encode(
    tokenizer: Tokenizer, texts: list[str], special: bool = False
) -> list[list[int]]:
    """The token ids of each text.

    Args:
      tokenizer: of transformers.
      texts: any number of them.
      special: with the special tokens that the tokenizer puts around a text.

    Raises:
      BadInput: text that the tokenizer has no tokens for.
    """
    try:
        found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False,
                          verbose=False)
    except Exception as error:  # the Rust library raises plain Exception
        raise BadInput(f"the tokenizer cannot encode the text ({first_line(error)}): check its "
                       "tokenizer.json for an unknown-word token") from error
    return cast(list[list[int]], found["input_ids"])


def begins_with(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, found by a text of one letter."""
    (bare,), (whole,) = (encode(tokenizer, ["a"], special) for special in (False, True))
    if not bare:  # its normaliser leaves nothing of a letter, so take one of its own tokens
        text = next(iter(tokenizer.get_vocab()))
        (bare,), (whole,) = (encode(tokenizer, [text], special) for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    found = (n for n in starts if whole[n : n + len(bare)] == bare)
    return whole[: next(found, 0)]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, as a model reads it up to where it goes on.

    The special tokens that the tokenizer puts before a text come first, unless the text itself
    begins with them; those that it puts behind a text are left out, for they would end it.
    """
    before, (ids,) = begins_with(tokenizer), encode(tokenizer, [text])
    there = ids[: len(before)] == before or ids[:1] == before[:1]
    return ids if there else [*before, *ids]


def prompt_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """The `text_ids` of a text that a model is to continue, checked against its table.

    Args:
      tokenizer: of transformers.
      text: the prompt.
      vocab_size: rows of the model's table.

    Raises:
      BadInput: text that the tokenizer has no tokens for, or a token without a row in the table.

    Example:
      >>> prompt_ids(tokenizer, "<s> a prompt", 32000) == prompt_ids(tokenizer, " a prompt", 32000)
      True
    """
    ids = text_ids(tokenizer, text)
    check_ids(ids, tokenizer, vocab_size)
    return ids


def check_ids(
    ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, vocab_size: int
) -> None:
    """Raises BadInput, with the token, where an id has no row in a table of `vocab_size`."""
    largest = int(np.max(np.asarray(ids), initial=0))
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(f"the text holds the token {token!r} with id {largest}, "
                       f"{_ends_at(vocab_size)}: take that token out of the text, or use the "
                       "model's own tokenizer")


def _ends_at(vocab_size: int) -> str:
    return f"and the model's vocabulary ends at {vocab_size - 1}"
