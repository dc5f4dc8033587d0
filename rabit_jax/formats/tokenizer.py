"""Tokenizers as files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from rabit_jax.data.tokenizer import _allow_threads
from rabit_jax.errors import BadInput

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes the tokeniser's files into `folder`, as transformers names them."""
    tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokeniser of a local model folder; None where the folder holds none.

    Raises:
      BadInput: The folder has tokeniser files that transformers cannot read.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        return None
    _allow_threads()
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        loader = PreTrainedTokenizerFast if _is_generic(Path(folder)) else AutoTokenizer
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files surface as many types, some of them plain Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"cannot read the tokeniser in {str(folder)!r} ({reason}); restore its tokenizer.json"
        ) from error


def _is_generic(folder: Path) -> bool:
    """Whether tokenizer.json is the whole tokeniser.

    AutoTokenizer may still choose a class by the model's type, such as Qwen2's, and that class
    puts its own normaliser and word pattern in place of the file's.
    """
    path = folder / "tokenizer_config.json"
    name = json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None
    return name in GENERIC and (folder / "tokenizer.json").is_file()
