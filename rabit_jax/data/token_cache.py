"""The token cache: files that are whole or not there, named by what they hold.

`<digest>.bin` holds tokens, `<digest>.json` beside it their dtype, counts and checksum, and a
checksum of itself; the latter is written last, and both by renaming.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rabit_jax.atomic import publish, workspace
from rabit_jax.data.mix import Unseen
from rabit_jax.data.partial_tokens import Partial, crc32
from rabit_jax.errors import BadInput
from rabit_jax.formats.tokenizer import encode
from rabit_jax.json_text import seal, unseal
from rabit_jax.progress import reading, say
from rabit_jax.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
VERSION = 1  # of the cache's layout; a new number leaves old files unused
CHUNK = 1 << 20  # characters tokenised at once
KEEP = 1 << 26  # bytes of text after which what is tokenised is kept for a process that goes on
DTYPES = ("uint16", "uint32")  # of tokens
COUNTS = ("documents", "bytes", "tokens", "crc32")  # of a header
SLOW = 4 << 20  # bytes of text whose progress is shown


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises BadInput for a tokeniser without a tokenizer.json or an end-of-text token."""
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokeniser {type(tokenizer).__name__} has no tokenizer.json or no end-of-text"
            " token; wanted both; use a model whose folder has them"
        )


def head(tokenizer: PreTrainedTokenizerBase) -> Json:
    """What tokens depend on besides the text, as JSON."""
    model = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    model.pop("truncation", None)  # state of the last call, without effect on the next
    model.pop("padding", None)
    return {"version": VERSION, "end": tokenizer.eos_token_id, "tokenizer": model}


class Digest:
    """sha256 over the tokeniser and each document with its length, in hex."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        text = json.dumps(head(tokenizer), sort_keys=True)
        self._hashed = hashlib.sha256(text.encode())

    def add(self, data: bytes) -> None:
        """Takes the UTF-8 bytes of the next document."""
        self._hashed.update(len(data).to_bytes(8, "big"))
        self._hashed.update(data)

    def hex(self) -> str:
        """Of the documents so far."""
        return self._hashed.hexdigest()


def read_header(path: Path) -> dict | None:
    """The header of a sound cache file; None where there is none or it is damaged."""
    side = path.with_suffix(".json")
    if not side.is_file():
        return None
    try:
        header = unseal(side.read_text(encoding="utf-8"))
        if _is_header(header) and header["digest"] == path.stem and header["crc32"] == crc32(path):
            size = header["tokens"] * np.dtype(header["dtype"]).itemsize
            if size == path.stat().st_size:
                return header
    except (OSError, ValueError):
        pass
    say(f"token cache {path} is damaged; building it again")
    return None


def _is_header(found: Json) -> bool:
    """Whether an object has the fields of a header, each of its kind, and no other."""
    kinds = {"dtype": str, "digest": str} | dict.fromkeys(COUNTS, int)
    return (found.keys() == kinds.keys()
            and all(type(found[name]) is kind for name, kind in kinds.items())
            and found["dtype"] in DTYPES and min(found[name] for name in COUNTS) >= 0)


class _Changed(Exception):
    """The text is not the one that an earlier process began to tokenise."""


def build(
    folder: Path,
    key: str,
    parts: Callable[[], Iterable[tuple[Iterable[str], int]]],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    size: int | None = None,
) -> dict:
    """Tokenises text into the cache, and returns the header of what it holds then.

    After every `KEEP` bytes of text what is done is kept under `key`. A process that was stopped
    is then gone on with: the documents are read again, to find that they are the same, but those
    that were tokenised are not tokenised again.

    Args:
      folder: The cache.
      key: Stands for the text and the tokeniser.
      parts: Returns documents with the number of tokens after which the rest of them is left; 0
        never.
      tokenizer: It appends its end-of-text token to each document.
      what: The text's name in the progress bar.
      size: UTF-8 bytes of the text, where they are known.

    Raises:
      BadInput: There is no text.
      OSError: The folder cannot be written.
    """
    with workspace(folder / "tokens") as place:
        partial = Partial(folder, key, place)
        try:
            header = _written(partial, parts(), tokenizer, what, size)
        except _Changed:
            say(f"{what} is not the text that was being tokenised; it is tokenised from the start")
            partial.drop()
            header = _written(partial, parts(), tokenizer, what, size)
        if not header["bytes"]:
            raise BadInput(f"found no text to tokenise for {what}: blank and repeated documents, "
                           "and in training those of the evaluation text, are left out; give more")
        header["crc32"] = partial.crc32
        side = place / "json"
        side.write_text(seal(header), encoding="utf-8")
        path = folder / f"{header['digest']}.bin"
        publish(partial.tokens, path)
        publish(side, path.with_suffix(".json"))
        partial.drop()
    return header


def _written(
    partial: Partial,
    parts: Iterable[tuple[Iterable[str], int]],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    size: int | None,
) -> dict:
    """Writes the tokens and returns their header without a checksum."""
    largest = max(tokenizer.get_vocab().values(), default=0)  # not their number: ids may have gaps
    dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
    header = {"dtype": dtype.name, "documents": 0, "bytes": 0, "tokens": 0}
    digest, left = Digest(tokenizer), partial.take(dtype.itemsize)
    known, kept = len(left.lengths), left.bytes
    if known:
        say(f"{what}: tokenising goes on after {known} documents")
    with (
        partial.writing(),
        reading(f"tokenising {what}", SLOW, counted=False) as done,
    ):
        for text, ids in _taken(parts, tokenizer, left.lengths):
            data = text.encode()
            digest.add(data)
            if ids is not None:
                partial.append(np.asarray(ids, dtype))
            header["tokens"] += int(left.lengths[header["documents"]]) if ids is None else len(ids)
            header["documents"] += 1
            header["bytes"] += len(data)
            if header["documents"] == known and digest.hex() != left.digest:
                raise _Changed
            if header["bytes"] - kept >= KEEP and ids is not None:
                partial.keep(header["bytes"], digest.hex())
                kept = header["bytes"]
            done(header["bytes"], size, documents=header["documents"], tokens=header["tokens"])
    if header["documents"] < known:
        raise _Changed
    return {**header, "digest": digest.hex()}


def _taken(
    parts: Iterable[tuple[Iterable[str], int]],
    tokenizer: PreTrainedTokenizerBase,
    known: np.ndarray,
) -> Iterator[tuple[str, list[int] | None]]:
    """The documents of all parts with their ids, of each part until it has enough tokens.

    Of the first documents the lengths `known` are known already: they have no ids here.
    """
    place = 0
    for documents, most in parts:
        found, begin, rest = 0, place, iter(documents)
        while place < len(known) and not (most and found >= most):
            text = next(rest, None)
            if text is None:
                break
            yield text, None
            found, place = found + int(known[place]), place + 1
        if place < len(known) or (most and found >= most):
            continue
        used = place - begin
        for text, ids in _encoded(rest, tokenizer):
            yield text, ids
            found, used = found + len(ids), used + 1
            if most and found >= most:
                if isinstance(documents, Unseen):
                    documents.used(used)
                break


def _encoded(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    """Each document with its ids and the end-of-text token.

    A group is tokenised, on all cores, while the next one is read.
    """
    end = cast(int, tokenizer.eos_token_id)
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[list[str], Future[list[list[int]]]]] = deque()
        for group in _groups(documents):
            waiting.append((group, pool.submit(encode, cast(Any, tokenizer), group)))
            if len(waiting) > 1:
                yield from _ended(*waiting.popleft(), end)
        if waiting:
            yield from _ended(*waiting.popleft(), end)


def _ended(
    group: list[str], ids: Future[list[list[int]]], end: int
) -> Iterator[tuple[str, list[int]]]:
    for text, found in zip(group, ids.result(), strict=True):
        yield text, [*found, end]


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
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
