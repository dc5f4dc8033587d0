"""What tokenising has made so far, kept beside the token cache so that a stopped run goes on.

`<key>.partial.bin` and `<key>.partial.lengths` are hard links to the files that a process appends
to, `<key>.partial.json` says how much of them is sound. Two processes that tokenise the same text
write the same tokens, so whichever has linked its files last, a prefix of them is right.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt32

from rabit_jax.atomic import remove, write_text
from rabit_jax.json_text import seal, unseal

_KINDS = ("bin", "lengths", "json")


@dataclass(frozen=True)
class Left:
    """Tokens of the first documents of a text.

    Attributes:
      lengths: tokens of each document, its end-of-text token counted, `[n]`.
      bytes: UTF-8 bytes of these documents.
      digest: of the tokeniser and these documents, see `token_cache.Digest`.
    """

    lengths: UInt32[np.ndarray, " n"]
    bytes: int
    digest: str


NOTHING = Left(np.zeros(0, np.uint32), 0, "")


class Partial:
    """The tokens of one key while they are written, and what of them is kept.

    Attributes:
      tokens: path of the tokens, in a temporary folder.
    """

    def __init__(self, folder: Path, key: str, place: Path):
        """Nothing is read or written yet; `place` is the temporary folder."""
        self.kept = {kind: folder / f"{key}.partial.{kind}" for kind in _KINDS}
        self.works = {"bin": place / "bin", "lengths": place / "lengths"}
        self.tokens = self.works["bin"]
        self._sums = dict.fromkeys(self.works, 0)
        self._files: dict[str, BinaryIO] = {}
        self._linked = False

    def take(self, itemsize: int) -> Left:
        """Begin with what an earlier process has left, where it is sound; else with nothing."""
        try:
            found = self._sound(itemsize)
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError):
            found = None
        if found is None:
            self.drop()
            for work in self.works.values():
                work.write_bytes(b"")
        self._sums = {kind: crc32(work) for kind, work in self.works.items()}
        return found or NOTHING

    def _sound(self, itemsize: int) -> Left | None:
        state = unseal(self.kept["json"].read_text(encoding="utf-8"))
        for kind, work in self.works.items():
            shutil.copyfile(self.kept[kind], work)
            if work.stat().st_size < state["sizes"][kind]:
                return None
            os.truncate(work, state["sizes"][kind])
            if crc32(work) != state["crc32"][kind]:
                return None
        lengths = np.fromfile(self.works["lengths"], np.uint32)
        if int(lengths.sum()) * itemsize != state["sizes"]["bin"]:
            return None
        return Left(lengths, int(state["bytes"]), str(state["digest"]))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, `append` and `keep` may be called."""
        with contextlib.ExitStack() as stack:
            self._files = {k: stack.enter_context(open(w, "ab")) for k, w in self.works.items()}
            yield

    def append(self, ids: np.ndarray) -> None:
        """Write the tokens of the next document, in the dtype of the cache."""
        for kind, content in (("bin", ids.tobytes()), ("lengths", np.uint32(len(ids)).tobytes())):
            self._files[kind].write(content)
            self._sums[kind] = zlib.crc32(content, self._sums[kind])

    @property
    def crc32(self) -> int:
        """Of all tokens written so far."""
        return self._sums["bin"]

    def keep(self, size: int, digest: str) -> None:
        """Note that all that was written so far, `size` bytes of text, is sound.

        On a file system without hard links nothing is kept.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        try:
            self._link()
        except OSError:
            return
        sizes = {kind: work.stat().st_size for kind, work in self.works.items()}
        state = {"sizes": sizes, "crc32": self._sums, "bytes": size, "digest": digest}
        write_text(self.kept["json"], seal(state))

    def _link(self) -> None:
        for kind, work in self.works.items() if not self._linked else ():
            new = work.with_name(f"{work.name}.link")
            os.link(work, new)
            os.replace(new, self.kept[kind])
        self._linked = True

    def drop(self) -> None:
        """Remove what is kept."""
        with contextlib.suppress(OSError):
            for file in reversed(self.kept.values()):
                remove(file)


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            total = zlib.crc32(part, total)
    return total
