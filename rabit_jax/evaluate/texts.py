"""The texts on which perplexities are published: their names, their documents, their windows."""

from __future__ import annotations

import difflib
import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from rabit_jax.data.readers import file_documents, is_table, matching_files, named_text
from rabit_jax.data.tokens import windows
from rabit_jax.errors import BadInput
from rabit_jax.formats.tokenizer import text_ids
from rabit_jax.types import Tokenizer

FILE = "file:"
DRAWS = 1_000_000  # attempts after which no document can be long enough


@dataclass(frozen=True)
class Protocol:
    """The text of a published perplexity, and its windows.

    Attributes:
      data: a key of `rabit_jax.data.NAMED`.
      split: a split of that dataset.
      documents: number of documents, from the first, that are joined by spaces to one text; 0 for
        all.
      windows: largest number of windows; 0 for all.
      drawn: windows are not cut from one text in order but drawn at random from documents that are
        longer than a window: `random.Random(0)` draws the document and then the position in it.
    """

    data: str
    split: str
    documents: int = 0
    windows: int = 0
    drawn: bool = False


# As in the code of GPTQ (Frantar et al., arXiv 2210.17323) and most papers after it. Its `c4` and
# `c4-new` give different figures for the same model.
TEXTS = {
    "wikitext2": Protocol("wikitext2", "test"),
    "c4": Protocol("c4", "validation", windows=256, drawn=True),
    "c4-new": Protocol("c4", "validation", documents=1100, windows=256),
}


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a text, arguments of `perplexity`.

    Attributes:
      tokens: n windows of t tokens.
      text_bytes: UTF-8 bytes of the text that the windows were cut from; None if they were drawn.
      total_tokens: tokens of that text; None if the windows were drawn.
    """

    tokens: Int32[np.ndarray, "n t"]
    text_bytes: int | None = None
    total_tokens: int | None = None


def check_name(name: str) -> None:
    """Raises BadInput for a name that is neither a key of `TEXTS` nor `file:` with a file."""
    if name in TEXTS:
        return
    path = name.removeprefix(FILE)
    if path not in ("", name):
        try:
            matching_files((path,))
        except BadInput as error:
            raise BadInput(f"{name} names no text: {error}") from None
        return
    if name and Path(os.path.expanduser(name)).is_file():
        raise BadInput(f"no text for perplexities is named {name!r}, but there is a file of that "
                       f"name: give {FILE}{name}")
    near = difflib.get_close_matches(name, TEXTS, n=1, cutoff=0.0)[0]
    raise BadInput(f"no text for perplexities is named {name!r}, the nearest is {near!r}: choose "
                   f"from {', '.join(TEXTS)}, or give {FILE}PATH")


def read_text(name: str) -> list[str]:
    """The documents of a text, downloaded if they are not on this machine.

    Args:
      name: a key of `TEXTS`, or `file:` and the path of a UTF-8 file, which is one document, or
        of a table, whose rows (column "text") are joined by a blank line to one.

    Raises:
      BadInput: an unknown name, no such file, or a dataset that cannot be reached.
    """
    check_name(name)
    if name.startswith(FILE):
        paths = matching_files((name.removeprefix(FILE),))
        # Rows are joined as those of WikiText-2 are.
        return ["".join(("\n\n" if is_table(path) else "").join(file_documents((str(path),)))
                        for path in paths)]
    try:
        rows = named_text(TEXTS[name].data, TEXTS[name].split)
        return list(itertools.islice(rows, TEXTS[name].documents or None))
    except BadInput as error:
        raise BadInput(f"{error} (here: {FILE}PATH instead of {name})") from error


def text_windows(
    name: str, documents: Sequence[str], tokenizer: Tokenizer, context: int,
    most: int | None = None, progress: Callable[[int, int], None] | None = None,
    begin: int | None = None,
) -> Windows:
    """The windows of `context` tokens on which the perplexity of a text is computed.

    The whole text is tokenised at once, with the special tokens that the tokenizer itself adds at
    the beginning, and cut into non-overlapping windows; a shorter rest at the end is left out. The
    windows of `c4` are drawn instead, see `TEXTS`.

    Args:
      name: the argument of `read_text`.
      documents: its result.
      tokenizer: of transformers.
      context: t, tokens of a window.
      most: largest number of windows, from the first; None for all windows of the text.
      progress: called with (windows drawn, windows wanted).
      begin: token that replaces the first one of every window. Gemma predicts badly without its
        begin token; figures of other models are published without one.

    Raises:
      BadInput: a text that is shorter than one window.

    Example:
      >>> found = text_windows("wikitext2", read_text("wikitext2"), tokenizer, 2048)
      >>> perplexity(model, params, found.tokens, batch_size=8).ppl
    """
    protocol = TEXTS.get(name, Protocol("", ""))
    count = min(n for n in (protocol.windows, most, 1 << 40) if n)
    if protocol.drawn:
        return Windows(_begun(_drawn(documents, tokenizer, context, count, progress), begin))
    documents = documents[: protocol.documents or None]
    text = " ".join(documents)
    tokens = text_ids(tokenizer, text)
    found = _begun(windows(np.asarray(tokens), context)[:count], begin)
    return Windows(found, len(text.encode()), len(tokens))


def _begun(rows: np.ndarray, begin: int | None) -> np.ndarray:
    if begin is None:
        return rows
    rows = np.array(rows)
    rows[:, 0] = begin
    return rows


def _drawn(
    documents: Sequence[str], tokenizer: Tokenizer, context: int, count: int,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    draw, found = random.Random(0), []
    for _ in range(DRAWS):
        text = documents[draw.randint(0, len(documents) - 1)]
        # So few bytes cannot give so many tokens; skipping them here only saves time.
        if 2 * len(text.encode()) + 8 <= context:
            continue
        tokens = text_ids(tokenizer, text)
        if len(tokens) <= context:
            continue
        start = draw.randint(0, len(tokens) - context - 1)
        found.append(tokens[start : start + context])
        if progress:
            progress(len(found), count)
        if len(found) == count:
            return np.asarray(found, np.int32)
    raise BadInput(f"found {len(found)} windows of {context} tokens in {len(documents)} documents, "
                   f"wanted {count}: give a shorter context")
