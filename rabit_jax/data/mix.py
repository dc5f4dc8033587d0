"""A mix of texts: its parts one after another, read document by document and never held whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rabit_jax.data.files import file_documents, matches
from rabit_jax.data.hub import hub_documents
from rabit_jax.data.named import NAMED, check_name, named_text
from rabit_jax.errors import BadInput


@dataclass(frozen=True)
class Part:
    """One text of a mix: a named dataset, local files, or a dataset of the hub.

    Attributes:
      name: A dataset of `rabit_jax.data.named`: "wikitext2" or "c4".
      files: Paths or globs of UTF-8 text.
      hub: Dataset id, or a local dataset folder.
      hub_config: Name of the dataset's configuration.
      hub_file: Path inside the dataset of the one file that is read.
      hub_column: Column that holds the text.
      split: Split of the dataset.
      documents: Most documents read; 0 reads all.
      tokens: Documents are read until they have this many tokens together; 0 reads all.
    """

    name: str = ""
    files: tuple[str, ...] = ()
    hub: str = ""
    hub_config: str = ""
    hub_file: str = ""
    hub_column: str = "text"
    split: str = "train"
    documents: int = 0
    tokens: int = 0

    def __post_init__(self):
        """Raises BadInput where it names no text or two, or has a limit below 0."""
        if [bool(self.name), bool(self.files), bool(self.hub)].count(True) != 1:
            raise BadInput(
                f"a part of a mix has name {self.name!r}, files {list(self.files)} and hub"
                f" {self.hub!r}; give exactly one of the three"
            )
        if self.name:
            check_name(self.name, self.split)
        if self.documents < 0 or self.tokens < 0:
            raise BadInput(
                f"a part of a mix is limited to {self.documents} documents and {self.tokens}"
                " tokens; use 0 for all, or more"
            )


def stream(parts: Iterable[Part], without: Iterable[Part] = ()) -> Iterator[tuple[Iterator, int]]:
    """The documents of each part in turn, with the most tokens wanted of it.

    A document that is blank, that came before in any part, or that is in `without` (whatever the
    token limits there) is left out. Hashes of what was read are kept (about 100 bytes a document),
    the text is not.

    Yields:
      `(documents, tokens)` for each part, to be read before the next is asked for.

    Raises:
      BadInput: What reading files, named datasets and the hub raises.
    """
    seen: set[bytes] = set()
    for part in without:
        seen.update(map(_mark, _read(part)))
    for part in parts:
        yield _new(_read(part), seen), part.tokens


def identity(parts: Iterable[Part]) -> list[Any]:
    """What the text of `parts` depends on, as JSON: settings, and the content of local files.

    A dataset of the hub counts as unchanged: its files are not read again to find out.
    """
    return [_identity(part) for part in parts]


def _identity(part: Part) -> dict[str, Any]:
    found = asdict(part)
    del found["files"]  # what is in them counts, not where they lie
    if part.name:
        return {**found, "place": asdict(NAMED[part.name])}
    if part.files:
        paths = dict.fromkeys(path for pattern in part.files for path in matches(pattern))
        return {**found, "content": [_digest(path) for path in paths]}
    if (folder := Path(part.hub)).is_dir():
        one = [folder / part.hub_file] if part.hub_file else folder.rglob("*")
        paths = sorted(path for path in one if path.is_file())
        content = [[str(path.relative_to(folder)), _digest(path)] for path in paths]
        return {**found, "content": content}
    return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error


def _read(part: Part) -> Iterator[str]:
    return islice(_all(part), part.documents or None)


def _all(part: Part) -> Iterator[str]:
    if part.name:
        return named_text(part.name, part.split)
    if part.files:
        return file_documents(part.files)
    return hub_documents(part.hub, part.hub_config, part.split, part.hub_file, part.hub_column)


def _new(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        mark = _mark(text)
        if text.strip() and mark not in seen:
            seen.add(mark)
            yield text


def _mark(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
