"""A byte-level BPE tokenizer trained on the training documents."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rabit_jax.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SMALLEST = 257  # 256 bytes and END
LARGEST = 1 << 22  # tokenizers reserves memory for all of them, and ends the process without it


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens.

    Id 0 is `<|endoftext|>` (begin, end and padding), then come the 256 bytes, then merges of pairs
    that occur at least twice: of little text there may be fewer tokens than `vocab_size`, see
    `len(tokenizer)`. The same documents give the same tokenizer, and encoding loses nothing:
    `decode(encode(s)) == s`.

    Args:
      documents: The training text only; evaluation text must not shape the tokens.
      vocab_size: Largest number of tokens, 257 to 4,194,304.

    Returns:
      A fast tokenizer of transformers, without prefix space and without a length limit.

    Raises:
      BadInput: `vocab_size` outside its range.

    Example:
      >>> tokenizer = train_tokenizer(["low lower lowest"], 300)
      >>> tokenizer.decode(tokenizer.encode("naïve 🙂"))
      'naïve 🙂'
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise BadInput(f"data.vocab_size is {vocab_size}, wanted {SMALLEST} to {LARGEST}")
    # Without an answer of ours, tokenizers warns whenever the process starts another.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
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
