"""Tokenizers as files of a model folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rabit_jax.errors import BadInput, first_line
from rabit_jax.types import Tokenizer

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


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

    Raises:
      BadInput: the folder has tokenizer files that transformers cannot read.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        return None
    # Without an answer of ours, tokenizers warns whenever the process starts another.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loader = PreTrainedTokenizerFast if _is_generic(Path(folder)) else AutoTokenizer
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files surface as many types, some of them plain Exception
        raise BadInput(
            f"cannot read the tokenizer in {str(folder)!r} ({first_line(error)}); restore its "
            "tokenizer.json"
        ) from error


def read_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer | None:
    """`load_tokenizer`, checked against the vocabulary of the model beside it.

    Raises:
      BadInput: its files cannot be read, or it makes tokens that the model does not have.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    # Gemma 3 1B's own tokenizer has a placeholder for images beyond the model's vocabulary. An
    # added token is harmless if it neither begins nor ends a text nor is in the chat template.
    used = f"{tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.chat_template}"
    beyond = [i for token, i in vocabulary.items()
              if i >= vocab_size and (token not in added or token in used)]
    if beyond:
        raise BadInput(f"the tokenizer in {folder} has token ids up to {max(beyond)}, the model's "
                       f"vocabulary ends at {vocab_size - 1}: put the tokenizer of this model "
                       "there")
    return tokenizer


def _is_generic(folder: Path) -> bool:
    """Whether tokenizer.json is the whole tokenizer.

    AutoTokenizer may still choose a class by the model's type, such as Qwen2's, and that class
    replaces the file's normaliser and word pattern by its own.
    """
    path = folder / "tokenizer_config.json"
    name = json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None
    return name in GENERIC and (folder / "tokenizer.json").is_file()
