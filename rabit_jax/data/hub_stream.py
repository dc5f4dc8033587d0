"""Training and evaluation text of one dataset of the hub, read document by document.

The documents are those of `sources.documents`, in the same order, but none is held: hashes alone
are, about 100 bytes for each document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Literal

from rabit_jax.data.mix import Part, content_hash, identity
from rabit_jax.data.readers import hub_documents
from rabit_jax.data.sources import DataConfig, check_data, from_files, split_rank
from rabit_jax.errors import BadInput

Side = Literal["train", "eval"]


def hub_stream(
    config: DataConfig, side: Side
) -> tuple[Callable[[], Iterator[tuple[Iterator[str], int]]], Mapping[str, object]]:
    """One side of a dataset as `tokenise_stream` takes it: `(function that opens it, recipe)`.

    Raises:
      BadInput: Settings that do not go with the source, or a file that cannot be read.
    """
    check_data(config)
    recipe = {
        "hub": identity([_part(config, config.hub_split)]), "side": side,
        "evaluation": identity(_evaluation_parts(config)),
        "unseen": identity([Part(files=config.unseen_files)] if config.unseen_files else []),
        "fraction": [config.eval_fraction, config.seed, config.max_documents],
    }
    return partial(_opened, config, side), recipe


def _opened(config: DataConfig, side: Side) -> Iterator[tuple[Iterator[str], int]]:
    found = _training(config) if side == "train" else _evaluation(config)
    yield _not_unseen(found, config), 0


def _training(config: DataConfig) -> Iterator[str]:
    if _evaluation_parts(config):
        held = set(map(content_hash, _evaluation(config)))
        return _unique(_rows(config, config.hub_split), held)
    return _split(config, held_out=False)


def _evaluation(config: DataConfig) -> Iterator[str]:
    if config.eval_files:
        return _unique(from_files(config.eval_files, config), set())
    if config.hub_eval_split:
        return _unique(_rows(config, config.hub_eval_split), set())
    return _split(config, held_out=True)


def _split(config: DataConfig, held_out: bool) -> Iterator[str]:
    """The documents that are held out for evaluation, or the others.

    Where the share is so small that none is held out, the one with the smallest rank is. So the
    documents before the first that is held out wait for it: with a share of 0.05 some twenty.
    """
    waiting: list[str] | None = []
    for text in _unique(_rows(config, config.hub_split), set()):
        held = split_rank(text, config.seed) < config.eval_fraction
        if waiting is not None and not held:
            waiting.append(text)
            continue
        if waiting is not None:
            yield from () if held_out else waiting
            waiting = None
        if held == held_out:
            yield text
    if waiting:
        least = min(waiting, key=lambda text: split_rank(text, config.seed))
        yield from (text for text in waiting if (text is least) == held_out)


def _not_unseen(texts: Iterable[str], config: DataConfig) -> Iterator[str]:
    """The texts; raises BadInput for one that the unseen text has as well."""
    unseen = set(map(content_hash, from_files(config.unseen_files, config)))
    for text in texts:
        if content_hash(text) in unseen:
            raise BadInput(
                "a document of data.unseen_files is in the training or evaluation text too; name "
                "files of another source"
            )
        yield text


def _unique(texts: Iterable[str], without: set[bytes]) -> Iterator[str]:
    """The texts that are neither blank nor repeated nor in `without`."""
    seen = set(without)
    for text in texts:
        mark = content_hash(text)
        if text.strip() and mark not in seen:
            seen.add(mark)
            yield text


def _rows(config: DataConfig, split: str) -> Iterator[str]:
    rows = hub_documents(config.hub, config.hub_config, split, column=config.hub_text_column,
                         streaming=config.streaming)
    return islice(rows, config.max_documents or None)


def _part(config: DataConfig, split: str) -> Part:
    return Part(hub=config.hub, hub_config=config.hub_config, split=split,
                hub_column=config.hub_text_column, documents=config.max_documents)


def _evaluation_parts(config: DataConfig) -> list[Part]:
    """What evaluation text of its own depends on; empty where documents are held out."""
    if config.eval_files:
        return [Part(files=config.eval_files)]
    return [_part(config, config.hub_eval_split)] if config.hub_eval_split else []
