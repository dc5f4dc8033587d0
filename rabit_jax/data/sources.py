"""Which text a run trains on, and which documents are held out for evaluation.

Embedded text and files are held in memory (`documents`, `unseen_documents`). What may be too large
for that is read as a stream: a mix of sources (`mixed`), and a dataset (`hub_stream.hub_stream`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from rabit_jax.data.conversations import Render
from rabit_jax.data.embedded import embedded_documents
from rabit_jax.data.mix import Part, has_conversations, identity, stream
from rabit_jax.data.readers import file_documents, hub_documents
from rabit_jax.errors import BadInput

Source = Literal["embedded", "files", "hub", "mix"]
SOURCES = get_args(Source)


@dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on, and how it becomes tokens.

    Attributes:
      source: "embedded" (text every Python carries), "files", "hub", or "mix".
      mix: The parts of the training text, one after another, for source "mix".
      mix_eval: The parts of its evaluation text; training leaves their documents out.
      mix_unseen: The parts of a text that is scored separately; training leaves them out too.
      begin: Put the tokenizer's begin token in place of the first token of every window, for models
        that were trained with one before every text (Gemma).
      files: Paths or globs of UTF-8 training text, or of tables (JSON, CSV, Parquet), for source
        "files".
      eval_files: Paths or globs of evaluation text; if given, it is all the evaluation text.
      unseen_files: Paths or globs of text from a source that training never sees, scored
        separately.
      hub: Dataset id, or a local dataset folder, for source "hub".
      hub_config: Name of the dataset's configuration, such as "en" for C4.
      hub_split: Split for training.
      hub_eval_split: Split for evaluation; "" holds out documents of `hub_split`.
      hub_text_column: Column that holds the text, of tables among files too.
      streaming: Read a hub dataset as it downloads instead of storing it first.
      max_documents: Most documents read from each source; 0 reads all. Those of embedded text and
        of files are held in memory. (The parts of a mix have limits of their own.)
      eval_fraction: Expected share of documents held out if no evaluation text is given.
      vocab_size: Size of the tokenizer if one is trained.
      seed: Chooses the documents held out.
      cache: Folder of the token cache.
    """

    source: Source = "embedded"
    mix: tuple[Part, ...] = ()
    mix_eval: tuple[Part, ...] = ()
    mix_unseen: tuple[Part, ...] = ()
    begin: bool = False
    files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()
    unseen_files: tuple[str, ...] = ()
    hub: str = ""
    hub_config: str = ""
    hub_split: str = "train"
    hub_eval_split: str = ""
    hub_text_column: str = "text"
    streaming: bool = True
    max_documents: int = 0
    eval_fraction: float = 0.05
    vocab_size: int = 2048
    seed: int = 0
    cache: str = ".cache/tokens"


def documents(config: DataConfig) -> tuple[list[str], list[str]]:
    """Training and evaluation documents; none is in both, and none is in either twice.

    If the config names no evaluation text, a document is held out where

        sha256(seed, text) / 2^256 < eval_fraction,

    so adding a document moves no other. Where no document meets this, the one with the smallest
    hash is held out.

    Args:
      config: The source and the split.

    Returns:
      `(train, evaluation)`, each in the order of the source.

    Raises:
      BadInput: Unknown source, a mix, a pattern without files, text that is not UTF-8, a dataset
        that cannot be read, or nothing left on one side.
    """
    check_data(config)
    if config.source == "mix":
        raise BadInput("a mix is a stream and not held as documents; read it as tokens")
    train = _unique(_training(config))
    held = _evaluation(config)
    if held is None:
        return _split(train, config)
    held = _unique(held)
    train = _without(train, held)
    if not train or not held:
        raise BadInput(
            f"found {len(train)} training and {len(held)} evaluation documents once evaluation"
            " text is taken out of training, wanted at least 1 of each; give more text"
        )
    return train, held


def unseen_documents(config: DataConfig, seen: Iterable[str]) -> list[str]:
    """The documents of `unseen_files`, an empty list if the config names no such files.

    Args:
      config: The source; `unseen_files` and `max_documents` are read.
      seen: Training and evaluation documents, which the unseen text must not contain.

    Raises:
      BadInput: A pattern without files, text that is not UTF-8, or a document that is in `seen`.
    """
    found = _unique(from_files(config.unseen_files, config))
    if both := set(found) & set(seen):
        raise BadInput(
            f"{len(both)} of {len(found)} documents of data.unseen_files are in the training or"
            " evaluation text too; name files of another source"
        )
    return found


def mixed(
    config: DataConfig,
    side: Literal["train", "eval", "unseen"],
    render: Render | None = None,
    template: str = "",
) -> tuple[Callable[[], Iterator[tuple[Iterator[str], int]]], Mapping[str, object]]:
    """One side of a mix as `tokenise_stream` takes it: `(function that opens it, recipe)`.

    No document is on two sides: training leaves out the documents of the other two, and the unseen
    text leaves out those of evaluation. A side without parts has an empty recipe.

    Args:
      config: The mix.
      side: Which of its texts.
      render: Makes text of conversations, see `conversations.rendering`.
      template: The chat template behind `render`; part of the recipe where a part holds
        conversations.

    Raises:
      BadInput: Settings that do not go with the source, or a file that cannot be read.
    """
    check_data(config)
    parts, without = {
        "train": (config.mix, (*config.mix_eval, *config.mix_unseen)),
        "eval": (config.mix_eval, ()),
        "unseen": (config.mix_unseen, config.mix_eval),
    }[side]
    recipe: dict[str, object] = {}
    if parts:
        recipe = {"parts": identity(parts), "without": identity(without)}
        if has_conversations((*parts, *without)):
            recipe["chat_template"] = template
    return partial(stream, parts, without, render), recipe


def check_data(config: DataConfig) -> None:
    """Raises BadInput for settings that are out of range or do not go with the source."""
    if config.source not in SOURCES:
        raise BadInput(f"data.source is {config.source!r}; choose one of {', '.join(SOURCES)}")
    if not 0 < config.eval_fraction < 1:
        raise BadInput(f"data.eval_fraction is {config.eval_fraction}; it must lie between 0 and 1")
    if config.max_documents < 0:
        raise BadInput(f"data.max_documents is {config.max_documents}; use 0 for all, or more")
    if config.source == "files" and not config.files:
        raise BadInput("data.source is 'files' but data.files is empty; list paths or globs there")
    if config.source == "hub" and not config.hub:
        raise BadInput("data.source is 'hub' but data.hub is empty; give a dataset id there")
    _check_mix(config)


def _check_mix(config: DataConfig) -> None:
    if config.source != "mix":
        for name in ("mix", "mix_eval", "mix_unseen"):
            if getattr(config, name):
                raise BadInput(
                    f"data.{name} goes with data.source=mix, not {config.source!r}; change one"
                )
        return
    for name in ("mix", "mix_eval"):
        if not getattr(config, name):
            raise BadInput(f"data.source is 'mix' but data.{name} is empty; list its parts there")
    for name in ("files", "eval_files", "unseen_files", "hub", "max_documents"):
        if getattr(config, name):
            raise BadInput(
                f"data.{name} is not read with data.source=mix; put it into a part of data.mix,"
                " data.mix_eval or data.mix_unseen"
            )


def _training(config: DataConfig) -> list[str]:
    if config.source == "files":
        return list(from_files(config.files, config))
    if config.source == "hub":
        return _hub(config, config.hub_split)
    return _first(embedded_documents(), config.max_documents)


def _evaluation(config: DataConfig) -> list[str] | None:
    if config.eval_files:
        return list(from_files(config.eval_files, config))
    if config.source == "hub" and config.hub_eval_split:
        return _hub(config, config.hub_eval_split)
    return None


def _hub(config: DataConfig, split: str) -> list[str]:
    rows = hub_documents(
        config.hub,
        config.hub_config,
        split,
        column=config.hub_text_column,
        streaming=config.streaming,
    )
    return _first(rows, config.max_documents)


def _split(texts: list[str], config: DataConfig) -> tuple[list[str], list[str]]:
    if len(texts) < 2:
        raise BadInput(
            f"found {len(texts)} different documents, wanted at least 2 to hold one out for"
            " evaluation; give more text, or evaluation text of its own in data.eval_files"
        )
    ranks = {text: split_rank(text, config.seed) for text in texts}
    held = [text for text in texts if ranks[text] < config.eval_fraction]
    held = held or [min(texts, key=ranks.__getitem__)]
    if len(held) == len(texts):
        raise BadInput(
            f"data.eval_fraction {config.eval_fraction} holds out all {len(texts)} documents;"
            " lower it or give more text"
        )
    return _without(texts, held), held


def split_rank(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _without(texts: list[str], held: list[str]) -> list[str]:
    chosen = set(held)
    return [text for text in texts if text not in chosen]


def from_files(patterns: tuple[str, ...], config: DataConfig) -> Iterator[str]:
    """The documents of files, of a table those of the text column; `max_documents` at most."""
    found = file_documents(patterns, config.hub_text_column)
    return itertools.islice(found, config.max_documents or None)


def _first(texts: Iterable[str], most: int) -> list[str]:
    return list(itertools.islice(texts, most or None))
