"""The tokeniser: a model's own, or a byte-level BPE trained on the training documents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rabit_jax.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and END
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens.

    Id 0 is `<|endoftext|>` (begin, end and padding), then come the 256 bytes, then merges of pairs
    seen at least twice: on little text there may be fewer than asked, `len(tokenizer)` tells.
    The same documents give the same tokeniser, and any text survives: `decode(encode(s)) == s`.

    Args:
      documents: Training text alone; evaluation text must not shape the tokens.
      vocab_size: Most tokens, at least 257.

    Returns:
      A fast tokeniser of transformers, without prefix space and without a length limit.

    Raises:
      BadInput: `vocab_size` below 257.

    Example:
      >>> tokenizer = train_tokenizer(["low lower lowest"], 300)
      >>> tokenizer.decode(tokenizer.encode("naïve 🙂"))
      'naïve 🙂'
    """
    if vocab_size < SMALLEST:
        raise BadInput(f"data.vocab_size is {vocab_size}, wanted at least {SMALLEST}; raise it")
    _allow_threads()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


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


def _allow_threads() -> None:
    """Says yes to threads before tokenizers asks, so that it does not warn at every subprocess."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
