"""Readers of text: local files, datasets of the Hugging Face hub, and those that papers name.

Each yields one document after another and holds no more than one file, or one row of a dataset, in
memory.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import cast

from rabit_jax.data.conversations import Render
from rabit_jax.errors import BadInput, first_line
from rabit_jax.progress import say

PIECE = 32 * 1024  # most characters in one document of a file that is cut up

# The readers of `datasets` by the ending of a file, without that of a compression.
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
Row = Mapping[str, object]


def file_documents(patterns: tuple[str, ...], column: str = "text") -> Iterator[str]:
    """The documents of local files: of UTF-8 text, or of tables by their ending, see `is_table`.

    A text of at most 32,768 characters is one document; a longer one is cut by `pieces`. Of a table
    each row is one.

    Args:
      patterns: paths or globs; a file that several of them match is read once.
      column: of the tables, the column that holds the text.

    Raises:
      BadInput: a pattern that matches no file, a file that cannot be read or is not UTF-8, or a
        table without text in that column.
    """
    for path in matching_files(patterns):
        if is_table(path):
            if path.stat().st_size:  # the library fails at a file of no bytes
                yield from hub_documents(str(path.parent), file=path.name, column=column)
        else:
            yield from pieces(_read(path))


def is_table(path: Path) -> bool:
    """Whether a local file has rows: JSON, JSON lines, CSV or Parquet, compressed or not."""
    return _ending(path) in READERS and _ending(path) != ".txt"


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that paths or globs name, each once, in order.

    Raises:
      BadInput: a pattern that matches no file; the message names the nearest one.
    """
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(pattern)))


def _matches(pattern: str) -> list[Path]:
    whole = Path(os.path.expanduser(pattern))
    if whole.is_file():
        return [whole]
    found = sorted(map(Path, glob.glob(str(whole), recursive=True)))
    if paths := [path for path in found if path.is_file()]:
        return paths
    raise BadInput(f"no file matches {pattern!r}{_nearest(whole)}; correct the path or glob")


def _nearest(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return ""
    files = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, files, n=1, cutoff=0.6)
    return f" (the nearest file there is {str(folder / near[0])!r})" if near else ""


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        advice = "decompress it" if path.suffix in COMPRESSED else "convert it to UTF-8"
        raise BadInput(
            f"{str(path)!r} is not UTF-8 text at byte {error.start}"
            f" (0x{error.object[error.start]:02x}); {advice}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """`text` in order and complete, in pieces of at most `size` characters.

    A piece ends at the last blank line in its second half; where there is none, at the last end
    of a line there, at the last space, or else right at `size`.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + size // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def hub_documents(
    hub: str,
    config: str = "",
    split: str = "train",
    file: str = "",
    column: str = "text",
    streaming: bool = True,
    blank: bool = False,
    render: Render | None = None,
) -> Iterator[str]:
    """The texts of one split of a dataset, row by row.

    Rows that are null or blank are skipped, and their number is printed to stderr; so are
    conversations that a chat template refuses.

    Args:
      hub: dataset id on the Hugging Face hub, or a local dataset folder.
      config: name of the dataset's configuration, such as "en" for C4.
      split: the split to read.
      file: path inside the dataset; if given, only that file is read, whatever its configuration
        and split. It is downloaded as it is and kept under HF_HOME.
      column: the column that holds the text.
      streaming: read a split while it downloads; otherwise it is stored under HF_HOME first.
      blank: keep blank rows, which are the empty lines of a running text.
      render: makes text of what the column holds, for a column of conversations.

    Raises:
      BadInput: no such dataset, no network to reach it, or no text in that column. Every failure
        of the library becomes one sentence.
    """
    name = f"file {file!r}" if file else f"split {split!r}"
    try:
        rows = _file_rows(hub, file) if file else _split_rows(hub, config, split, streaming)
        what = f"{name} of dataset {hub!r}"
        yield from _rendered(rows, what, column, render) if render else _column(
            rows, what, column, blank)
    except BadInput:
        raise
    except Exception as error:  # the library raises dozens of types, its transports more
        advice = "correct its files, the split or the configuration" if Path(hub).is_dir() else \
            "check the name, the configuration and the network, or use data.source=embedded"
        raise BadInput(
            f"cannot read {name} of dataset {hub!r} ({type(error).__name__}: {first_line(error)});"
            f" {advice}"
        ) from error


def _library() -> ModuleType:
    """`datasets`, without its log: what it logs of a damaged file it raises as well."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


def _split_rows(hub: str, config: str, split: str, streaming: bool) -> Iterable[Row]:
    datasets = _library()
    rows = datasets.load_dataset(hub, config or None, split=split, streaming=streaming)
    return cast(Iterable[Row], rows)


def _file_rows(hub: str, file: str) -> Iterable[Row]:
    """Rows of one file. `datasets` does not find a file again offline, the hub's cache does."""
    import huggingface_hub

    datasets = _library()
    reader, local = _reader(file), Path(hub)
    path = local / file if local.is_dir() else huggingface_hub.hf_hub_download(
        hub, file, repo_type="dataset"
    )
    # A name may hold what a pattern means, which the library takes it for.
    pattern = re.sub(r"[*?[]", r"[\g<0>]", str(path))
    rows = datasets.load_dataset(reader, data_files=pattern, split="train", streaming=True)
    return cast(Iterable[Row], rows)


def _ending(path: Path) -> str:
    """The ending of a name, without that of a compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _reader(file: str) -> str:
    ending = _ending(Path(file))
    if ending not in READERS:
        raise BadInput(
            f"cannot tell the format of {file!r} of a dataset; wanted a name that ends in one of"
            f" {', '.join(READERS)}, compressed or not ({', '.join(COMPRESSED)})"
        )
    return READERS[ending]


def _column(rows: Iterable[Row], name: str, column: str, blank: bool) -> Iterator[str]:
    """The texts of a column. Rows of null, and blank ones unless `blank`, are skipped; how many
    is said at the end."""
    skipped = texts = 0
    row: Row = {}
    try:
        for row in rows:
            text = row.get(column)
            if column not in row or not isinstance(text, str | None):
                raise _no_text(name, column, row)
            if text is None or not (blank or text.strip()):
                skipped += 1
                continue
            texts += 1
            yield text
        if skipped and not texts:
            raise _no_text(name, column, row)
    finally:
        if skipped:
            say(f"{name}: skipped {skipped:,} rows whose {column!r} is null or empty")


def _rendered(rows: Iterable[Row], name: str, column: str, render: Render) -> Iterator[str]:
    """The conversations of a column as text; how many rows gave none is said at the end."""
    skipped = texts = 0
    row: Row = {}
    try:
        for row in rows:
            text = render(row.get(column))
            if text is None:
                skipped += 1
            else:
                texts += 1
                yield text
        if row and not texts:
            raise BadInput(
                f"{name} has no conversation in column {column!r} that the chat template takes;"
                " wanted lists of messages with role and content; set hub_messages to one of"
                f" {', '.join(map(str, row))}"
            )
    finally:
        if skipped:
            say(f"{name}: skipped {skipped:,} rows whose {column!r} gives no conversation")


def _no_text(name: str, column: str, row: Row) -> BadInput:
    if row.get(column) is not None and not isinstance(row[column], str):
        return BadInput(f"{name} has a row with {row[column]!r:.60} in column {column!r}, wanted "
                        "text or null; make it text, or name another column")
    return BadInput(
        f"{name} has no text in column {column!r}; set data.hub_text_column (of a part of a"
        f" mix: hub_column) to one of {', '.join(map(str, row))}"
    )


@dataclass(frozen=True)
class NamedDataset:
    """A dataset on the hub that papers evaluate on.

    Attributes:
      hub: its id.
      config: its configuration.
      files: by split, the one file that stands for it; a split without one is read whole.
      splits: the splits that it has.
      messages: the column of its conversations; "" where the column "text" holds plain text.
      joined: the rows of a split are lines of one running text. They are joined by a blank line to
        one document, as for published perplexities. Otherwise each row is a document.
    """

    hub: str
    config: str = ""
    files: dict[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "validation")
    joined: bool = False
    messages: str = ""


NAMED = {
    "wikitext2": NamedDataset(
        hub="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits=("train", "validation", "test"),
        joined=True,
    ),
    "c4": NamedDataset(  # one shard of each split: 356,317 and 45,576 web pages
        hub="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "fineweb-edu": NamedDataset(  # the first file of the sample of 10 billion tokens
        hub="HuggingFaceFW/fineweb-edu",
        files={"train": "sample/10BT/000_00000.parquet"},
        splits=("train",),
    ),
    "ultrachat": NamedDataset(
        hub="HuggingFaceH4/ultrachat_200k", splits=("train_sft", "test_sft"), messages="messages"
    ),
    "smoltalk": NamedDataset(
        hub="HuggingFaceTB/smoltalk", config="all", splits=("train", "test"), messages="messages"
    ),
}


def named_text(name: str, split: str, render: Render | None = None) -> Iterator[str]:
    """The documents of a split of a named dataset, downloaded once and kept under HF_HOME.

    Args:
      name: a key of `NAMED`.
      split: one of its splits.
      render: makes text of conversations, for a dataset that holds them.

    Raises:
      BadInput: at once, an unknown name or split, or conversations without `render`; at the first
        document, a dataset that is neither stored on this machine nor within reach.

    Example:
      >>> text = "".join(named_text("wikitext2", "test"))  # doctest: +SKIP
    """
    check_name(name, split)
    if NAMED[name].messages and render is None:
        raise BadInput(f"dataset {name!r} holds conversations, which become text by a model's chat"
                       " template; use it as a part of data.mix with a chat model as teacher")
    return _named_documents(name, split, render)


def check_name(name: str, split: str) -> None:
    """Raises BadInput for a dataset or a split that `NAMED` does not have."""
    if name not in NAMED:
        raise BadInput(f"no dataset is named {name!r}; choose one of {', '.join(NAMED)}")
    if split not in NAMED[name].splits:
        raise BadInput(
            f"dataset {name!r} has no split {split!r}; choose one of"
            f" {', '.join(NAMED[name].splits)}"
        )


def _named_documents(name: str, split: str, render: Render | None) -> Iterator[str]:
    found = NAMED[name]
    file = found.files.get(split, "")
    try:
        rows = hub_documents(
            found.hub, found.config, split, file, found.messages or "text", streaming=False,
            blank=found.joined, render=render if found.messages else None,
        )
        if found.joined:
            yield "\n\n".join(rows)
        else:
            yield from rows
    except BadInput as error:
        raise BadInput(
            f"{name!r} is not on this machine: {error.__cause__ or error}; run once with a network"
            " (it is kept under HF_HOME), copy HF_HOME from a machine that has it, or use"
            " data.source=files"
        ) from error
