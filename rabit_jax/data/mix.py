"""A mix of texts: its parts one after another, read document by document and never held whole.

A part is a named dataset, local files or a dataset of the hub. `stream` reads the parts and leaves
out repeated documents; `identity` describes them, so that the token cache knows the same mix again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from rabit_jax.atomic import digest
from rabit_jax.data.conversations import Render
from rabit_jax.data.readers import (
    NAMED,
    check_name,
    file_documents,
    hub_documents,
    is_table,
    matching_files,
    named_text,
)
from rabit_jax.errors import BadInput


@dataclass(frozen=True)
class Part:
    """One text of a mix: a named dataset, local files, or a dataset of the hub.

    Attributes:
      name: A key of `rabit_jax.data.NAMED`: "wikitext2" or "c4".
      files: Paths or globs of UTF-8 text, or of tables (JSON, CSV, Parquet) with `hub_column`.
      hub: Dataset id, or a local dataset folder.
      hub_config: Name of the dataset's configuration.
      hub_file: Path inside the dataset of a single file to read.
      hub_column: Column that holds the text, of tables among `files` too.
      hub_messages: Column that holds conversations, which become text by the teacher's chat
        template; "" where the dataset holds plain text.
      split: Split of the dataset.
      documents: Most documents to read; 0 reads all.
      tokens: Documents are read until they have this many tokens in total; 0 reads all.
    """

    name: str = ""
    files: tuple[str, ...] = ()
    hub: str = ""
    hub_config: str = ""
    hub_file: str = ""
    hub_column: str = "text"
    hub_messages: str = field(default="", metadata={"added": True})
    split: str = "train"
    documents: int = 0
    tokens: int = 0

    def __post_init__(self):
        """Raises BadInput unless it names exactly one text, with limits of 0 or more."""
        if [bool(self.name), bool(self.files), bool(self.hub)].count(True) != 1:
            raise BadInput(
                f"a part of a mix has name {self.name!r}, files {list(self.files)} and hub"
                f" {self.hub!r}; give exactly one of the three"
            )
        if self.name:
            check_name(self.name, self.split)
        if self.hub_messages and not self.hub:
            raise BadInput(
                f"a part of a mix has hub_messages {self.hub_messages!r} and no hub; that is a"
                " column of a dataset: give hub too, or leave it out"
            )
        if self.documents < 0 or self.tokens < 0:
            raise BadInput(
                f"a part of a mix is limited to {self.documents} documents and {self.tokens}"
                " tokens; use 0 for all, or more"
            )


def has_conversations(parts: Iterable[Part]) -> bool:
    """Whether a part holds conversations, so that its text depends on a chat template."""
    return any(_messages(part) for part in parts)


def stream(
    parts: Iterable[Part], without: Iterable[Part] = (), render: Render | None = None
) -> Iterator[tuple[Iterator[str], int]]:
    """The documents of each part in turn, with the most tokens that are wanted of it.

    A document is left out if it is blank, was used before in any part, or is in `without` (whatever
    the token limits there). Only hashes of the documents are kept, about 100 bytes each.

    Args:
      parts: What is read.
      without: What is left out.
      render: Makes text of conversations, see `conversations.rendering`; needed where a part holds
        some.

    Yields:
      `(documents, tokens)` for each part, to be read before the next is asked for.

    Raises:
      BadInput: What reading files, named datasets and the hub raises.
    """
    seen: set[bytes] = set()
    for part in without:
        seen.update(map(content_hash, _read(part, render)))
    for part in parts:
        yield Unseen(_read(part, render), seen), part.tokens


def identity(parts: Iterable[Part]) -> list[dict[str, object]]:
    """All that the text of `parts` depends on, as JSON: settings, and hashes of local files.

    A dataset on the hub counts as unchanged: its files are not read again to find out.
    """
    return [_identity(part) for part in parts]


def _identity(part: Part) -> dict[str, object]:
    found = asdict(part)
    del found["files"]  # their content counts, not their paths
    if not part.hub_messages:
        del found["hub_messages"]  # mixes of plain text keep the key that they had without it
    if part.name:
        return {**found, "place": asdict(NAMED[part.name])}
    if part.files:
        # A table's rows are not what its content reads as.
        return {**found, "content": [
            ["table", _digest(path)] if is_table(path) else _digest(path)
            for path in matching_files(part.files)]}
    if (folder := Path(part.hub)).is_dir():
        one = [folder / part.hub_file] if part.hub_file else folder.rglob("*")
        paths = sorted(path for path in one if path.is_file())
        content = [[str(path.relative_to(folder)), _digest(path)] for path in paths]
        return {**found, "content": content}
    return found


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error


def _messages(part: Part) -> str:
    """The column of a part's conversations, "" where it has none."""
    return NAMED[part.name].messages if part.name else part.hub_messages


def _read(part: Part, render: Render | None) -> Iterator[str]:
    return islice(_all(part, render), part.documents or None)


def _all(part: Part, render: Render | None) -> Iterator[str]:
    if _messages(part) and render is None:
        raise BadInput(
            "a part of data.mix holds conversations, which become text by a chat template, and the"
            " teacher is trained here; name a chat model in teacher.path, or leave the part out"
        )
    if part.name:
        return named_text(part.name, part.split, render)
    if part.files:
        return file_documents(part.files, part.hub_column)
    column = part.hub_messages or part.hub_column
    return hub_documents(part.hub, part.hub_config, part.split, part.hub_file, column,
                         render=render if part.hub_messages else None)


class Unseen(Iterator[str]):
    """The texts that are neither blank nor in `seen`, which grows by their hashes."""

    def __init__(self, texts: Iterable[str], seen: set[bytes]):
        self._texts, self._seen = iter(texts), seen
        self._new: list[bytes] = []  # what this has added to `seen`, in order

    def __next__(self) -> str:
        """The next of them."""
        for text in self._texts:
            mark = content_hash(text)
            if text.strip() and mark not in self._seen:
                self._seen.add(mark)
                self._new.append(mark)
                return text
        raise StopIteration

    def used(self, count: int) -> None:
        """Only the first `count` were used; those that were read ahead may come again elsewhere."""
        self._seen.difference_update(self._new[count:])


def content_hash(text: str) -> bytes:
    """16 bytes that stand for a document."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
