"""Text as one memory-mapped array of tokens, and its deterministic batches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Integer

from rabit_jax.atomic import write_text
from rabit_jax.data.token_cache import Digest, build, check_tokenizer, head, read_header
from rabit_jax.errors import BadInput
from rabit_jax.json_text import seal, unseal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenText:
    """Documents as one run of tokens, each document followed by the end-of-text token.

    Attributes:
      tokens: `[n]` uint16, or uint32 if the tokenizer has an id above 65,535; a read-only memory
        map.
      bytes: UTF-8 bytes of the text, end-of-text tokens not counted: the base of bits per byte.
      documents: Number of documents.
      digest: sha256 over documents, tokenizer and layout, in hex; the key of the cache.
    """

    tokens: Integer[np.ndarray, " n"]
    bytes: int
    documents: int
    digest: str


def tokenise(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    what: str = "the text",
) -> TokenText:
    """The tokens of `documents`, read from the cache if the same text was tokenised before.

    A cache entry is `<digest>.bin` (the tokens) and `<digest>.json` (dtype, counts, checksum), both
    written whole or not at all. An entry that does not match its checksum is built again, with one
    line on stderr.

    Args:
      documents: The text.
      tokenizer: A fast tokenizer (one with a tokenizer.json) that has an end-of-text token.
      cache_dir: Folder of the cache, created if missing.
      what: The text's name in the progress bar and in messages.

    Raises:
      BadInput: No text, a tokenizer that is not fast or has no end-of-text token, or a folder that
        cannot be written (a full disk).
    """
    check_tokenizer(tokenizer)
    digest = Digest(tokenizer)
    size = 0
    for text in documents:
        data = text.encode()
        digest.add(data)
        size += len(data)
    header = read_header(Path(cache_dir) / f"{digest.hex()}.bin") or _build(
        cache_dir, digest.hex(), lambda: [(documents, 0)], tokenizer, what, size
    )
    return _opened(cache_dir, header)


def tokenise_stream(
    parts: Callable[[], Iterable[tuple[Iterable[str], int]]],
    recipe: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    what: str = "the text",
) -> TokenText:
    """The tokens of text that is read once, document by document, and never held whole.

    `<key>.recipe.json`, where key is the sha256 of recipe and tokenizer, records the digest that
    the text had when it was read. As long as this file and the tokens are in the cache, `parts` is
    not called. A run that was stopped reads the documents again and tokenises on where it was.

    Args:
      parts: Returns the documents of each part with its limit, the number of tokens after which
        the rest of that part is skipped (0 for no limit), as `rabit_jax.data.mix.stream` does.
      recipe: All that the text depends on, as JSON.
      tokenizer: As in `tokenise`.
      cache_dir: As in `tokenise`.
      what: As in `tokenise`.

    Raises:
      BadInput: As in `tokenise`, and whatever `parts` raises.
    """
    check_tokenizer(tokenizer)
    text = json.dumps([recipe, head(tokenizer)], sort_keys=True)
    side = Path(cache_dir) / f"{hashlib.sha256(text.encode()).hexdigest()}.recipe.json"
    header = _recalled(side)
    if header is None:
        key = side.name.partition(".")[0]
        header = _build(cache_dir, key, parts, tokenizer, what)
        with writing_to(cache_dir):
            write_text(side, seal({"digest": header["digest"], "recipe": recipe}, indent=1))
    return _opened(cache_dir, header)


def _recalled(side: Path) -> dict | None:
    """The header of the tokens that a recipe gave; None where they are not in the cache."""
    try:
        digest = unseal(side.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        return None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        return None
    return read_header(side.parent / f"{digest}.bin")


def _build(
    cache_dir: str | Path,
    key: str,
    parts: Callable[[], Iterable[tuple[Iterable[str], int]]],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    size: int | None = None,
) -> dict:
    with writing_to(cache_dir):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        return build(Path(cache_dir), key, parts, tokenizer, what, size)


@contextlib.contextmanager
def writing_to(cache_dir: str | Path) -> Iterator[None]:
    """Inside, an OSError becomes BadInput: the token cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"cannot write the token cache in {str(cache_dir)!r} ({error.strerror or error});"
            " free space there or set data.cache to another folder"
        ) from error


def _opened(cache_dir: str | Path, header: dict) -> TokenText:
    path = Path(cache_dir) / f"{header['digest']}.bin"
    tokens = np.memmap(path, header["dtype"], "r", shape=(header["tokens"],))
    return TokenText(tokens, header["bytes"], header["documents"], header["digest"])


def batch(
    tokens: Integer[np.ndarray, " n"], step: int, batch_size: int, length: int, seed: int,
    rows: slice = slice(None),
) -> Int32[np.ndarray, "b t"]:
    """Training windows of one step: a pure function of (seed, step).

    An epoch e draws an offset o_e in [0, t) and a permutation p_e of its n_w = (n + 1) // t - 1
    windows from Philox(seed, e). Row r of step s is number i = s b + r, that is window
    p_e[i mod n_w] of epoch e = i // n_w: tokens from o_e + t p_e[i mod n_w] on. So an epoch
    has each of its windows once, none overlap, and a batch may end one epoch and begin the next.

    Args:
      tokens: The text, `[n]` integers.
      step: Number of the step, from 0.
      batch_size: b, rows.
      length: t, tokens in a row.
      seed: Zero or more.
      rows: Which rows of the batch are read; all of them unless it says otherwise.

    Returns:
      `[b, t]` int32.

    Raises:
      BadInput: The text has fewer than b windows.

    Example:
      >>> batch(np.arange(12), step=0, batch_size=2, length=4, seed=0).shape
      (2, 4)
    """
    _check_shape(batch_size, length)
    count = (len(tokens) + 1) // length - 1  # as many as fit at every offset
    if count < batch_size:
        raise BadInput(
            f"the training text is too short for one batch: {len(tokens)} tokens, wanted at least"
            f" {(batch_size + 1) * length - 1} for {batch_size} windows of {length}; give more"
            " text, a smaller batch or a shorter length"
        )
    numbers = range(step * batch_size, (step + 1) * batch_size)[rows]
    starts = [_start(seed, *divmod(number, count), count, length) for number in numbers]
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def windows(
    tokens: Integer[np.ndarray, " n"], length: int, what: str = "the evaluation text"
) -> Int32[np.ndarray, "w t"]:
    """All w = n // t non-overlapping evaluation windows of t tokens, in order, the tail dropped.

    Raises:
      BadInput: Fewer than `length` tokens; the message begins with `what`.
    """
    _check_shape(1, length)
    count = len(tokens) // length
    if count == 0:
        raise BadInput(
            f"{what} is too short for one window: {len(tokens)} tokens, wanted at"
            f" least {length}; give more text or a shorter length"
        )
    return np.asarray(tokens[: count * length]).reshape(count, length).astype(np.int32)


def _check_shape(batch_size: int, length: int) -> None:
    if batch_size < 1 or length < 1:
        raise BadInput(f"batch size {batch_size} and length {length} must both be at least 1")


def _start(seed: int, epoch: int, index: int, count: int, length: int) -> int:
    offset, order = _epoch(seed, epoch, count, length)
    return offset + length * int(order[index])


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int, length: int) -> tuple[int, np.ndarray]:
    """Offset and permutation; from raw bits, whose stream no release of NumPy may change."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    offset = int(bits.random_raw()) % length
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.setflags(write=False)
    return offset, order
