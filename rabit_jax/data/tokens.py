"""Text as one memory-mapped array of tokens, and its deterministic batches."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rabit_jax.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # of the cache's layout; a new number leaves old files unused
CHUNK = 1 << 20  # characters tokenised at once
SLOW = 4 << 20  # bytes of text above which a progress bar appears


@dataclass(frozen=True, eq=False)
class TokenText:
    """Documents as one run of tokens, each document followed by the end-of-text token.

    Attributes:
      tokens: [n] uint16, or uint32 above 65,536 tokens of vocabulary; a read-only memory map.
      bytes: UTF-8 bytes of the text, end-of-text tokens not counted: the base of bits per byte.
      documents: Number of documents.
      digest: sha256 over documents, tokeniser and layout, in hex; the key of the cache.
    """

    tokens: np.ndarray
    bytes: int
    documents: int
    digest: str


def tokenise(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path
) -> TokenText:
    """Tokens of `documents`, from the cache where the same text met the same tokeniser before.

    The cache is `<digest>.bin` (the tokens) beside `<digest>.json` (dtype, counts, checksum), the
    latter written last and both by renaming, so a stopped run leaves nothing half-written. Files
    that do not agree are built again, with one line on stderr.

    Args:
      documents: The text.
      tokenizer: A fast tokeniser (one with a tokenizer.json) that has an end-of-text token.
      cache_dir: Folder of the cache, created where missing.

    Raises:
      BadInput: No text, an unfit tokeniser, or a folder that cannot be written (a full disk).
    """
    if not any(documents):
        raise BadInput("found no text to tokenise; give documents that are not empty")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokeniser {type(tokenizer).__name__} has no tokenizer.json or no end-of-text"
            " token; wanted both; use a model whose folder has them"
        )
    digest = _digest(documents, tokenizer)
    path = Path(cache_dir) / f"{digest}.bin"
    header = _valid_header(path)
    if header is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            header = _build(path, documents, tokenizer)
        except OSError as error:
            raise BadInput(
                f"cannot write the token cache in {str(cache_dir)!r} ({error.strerror or error});"
                " free space there or set data.cache to another folder"
            ) from error
    tokens = np.memmap(path, header["dtype"], "r", shape=(header["tokens"],))
    return TokenText(tokens, header["bytes"], header["documents"], digest)


def batch(
    tokens: np.ndarray, step: int, batch_size: int, length: int, seed: int
) -> np.ndarray:
    """Training windows of one step: a pure function of (seed, step).

    An epoch e draws an offset o_e in [0, t) and a permutation p_e of its n_w = (n + 1) // t - 1
    windows from Philox(seed, e). Row r of step s is number i = s b + r, that is window
    p_e[i mod n_w] of epoch e = i // n_w: tokens from o_e + t p_e[i mod n_w] on. So an epoch meets
    each of its windows once, none overlap, and a batch may end one epoch and begin the next.

    Args:
      tokens: [n] integers.
      step: Counts from 0.
      batch_size: b, rows.
      length: t, tokens in a row.
      seed: Not negative.

    Returns:
      [b, t] int32.

    Raises:
      BadInput: The text has fewer than b windows.

    Example:
      >>> batch(np.arange(12), step=0, batch_size=2, length=4, seed=0).shape
      (2, 4)
    """
    _check_shape(batch_size, length)
    count = (len(tokens) + 1) // length - 1  # as many as fit whatever the offset
    if count < batch_size:
        raise BadInput(
            f"the training text is too short for one batch: {len(tokens)} tokens, wanted at least"
            f" {(batch_size + 1) * length - 1} for {batch_size} windows of {length}; give more"
            " text, a smaller batch or a shorter length"
        )
    numbers = range(step * batch_size, (step + 1) * batch_size)
    starts = [_start(seed, *divmod(number, count), count, length) for number in numbers]
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """All non-overlapping evaluation windows in order, the tail dropped: [n // t, t] int32.

    Raises:
      BadInput: Fewer than `length` tokens.
    """
    _check_shape(1, length)
    count = len(tokens) // length
    if count == 0:
        raise BadInput(
            f"the evaluation text is too short for one window: {len(tokens)} tokens, wanted at"
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


def _digest(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> str:
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model.pop("truncation", None)  # state of the last call, without effect on the next
    model.pop("padding", None)
    head = {"version": VERSION, "end": tokenizer.eos_token_id, "tokenizer": model}
    hashed = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for text in documents:
        data = text.encode()
        hashed.update(len(data).to_bytes(8, "big"))
        hashed.update(data)
    return hashed.hexdigest()


def _valid_header(path: Path) -> dict | None:
    """The header of a sound cache file; None where there is none or it is damaged."""
    side = path.with_suffix(".json")
    if not side.exists():
        return None
    try:
        header = json.loads(side.read_text())
        sound = header["digest"] == path.stem and header["crc32"] == _crc32(path)
        sound &= header["tokens"] * np.dtype(header["dtype"]).itemsize == path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        print(f"token cache {path} is damaged; building it again", file=sys.stderr)
        return None
    return header


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            total = zlib.crc32(part, total)
    return total


def _build(path: Path, documents: list[str], tokenizer: PreTrainedTokenizerBase) -> dict:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    size = sum(len(text.encode()) for text in documents)
    header = {"digest": path.stem, "dtype": dtype.name, "documents": len(documents), "bytes": size}
    work, side = (path.with_suffix(f".{os.getpid()}.{end}") for end in ("bin", "json"))
    try:
        with work.open("wb") as file:
            for ids in _encoded(documents, tokenizer, size):
                file.write(np.asarray(ids, dtype).tobytes())
        header["tokens"] = work.stat().st_size // dtype.itemsize
        header["crc32"] = _crc32(work)
        side.write_text(json.dumps(header))
        os.replace(work, path)
        os.replace(side, path.with_suffix(".json"))
    finally:
        work.unlink(missing_ok=True)
        side.unlink(missing_ok=True)
    return header


def _encoded(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[list[int]]:
    """Ids of each document with its end, under a progress bar on stderr where it takes long."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=size < SLOW, transient=True) as bar:
        task = bar.add_task("tokenising", total=size)
        for group in _groups(documents):
            encoded = tokenizer(
                group, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for ids in encoded["input_ids"]:
                yield [*ids, tokenizer.eos_token_id]
            bar.advance(task, sum(len(text.encode()) for text in group))


def _groups(documents: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group
