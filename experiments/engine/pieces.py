"""What a block-wise run keeps on disk: each piece is there whole or not at all, with a checksum.

In several processes a piece is the same file of all rows: arrays are gathered, the first process
writes and removes, and every process reads. Whether a piece is there is for the first to say, and
one that any process finds damaged is damaged for all. So all of them call the methods of `Pieces`
in the same order; `claim` alone is for the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rabit_jax import BadInput, Stats, hosts
from rabit_jax.atomic import remove, replacing, write_tensors, write_text
from rabit_jax.errors import first_line
from rabit_jax.experiments.engine.records import Record, read_record, write_record
from rabit_jax.formats.packed_file import checksum, named_parts, part_names, text_checksum
from rabit_jax.json_text import parse
from rabit_jax.types import Array, Json, Params
from rabit_jax.weights.representations import abstract_packed

T = TypeVar("T")
_PLAIN = "plain"  # the part of a path that is an array and no packed node


class DamagedPiece(BadInput):
    """A piece that cannot be read or is not what was written.

    Attributes:
      folder: that of its stage.
      found: what was found, without what to do.
      everywhere: whether every process of the run raises this at the same place.
    """

    def __init__(self, file: Path, reason: str):
        self.folder, self.found = file.parent, f"{file} is damaged ({reason})"
        self.everywhere = not hosts.several()
        super().__init__(f"{self.found}: remove {file.parent} to start the stage again")


class Pieces:
    """A folder of arrays, packed blocks and records that belong to one `key`.

    Every file is written beside its name and renamed, so a name that exists is complete.
    """

    def __init__(self, folder: Path):
        """Nothing is read or written yet."""
        self.folder = folder

    def claim(self, key: str, resume: bool) -> bool:
        """Keep the pieces that were made with `key`; others are removed. True if some are kept.

        Raises:
          BadInput: `resume`, and the pieces there were made with another key.
        """
        file = self.folder / "key"
        found = file.read_text(errors="replace") if file.exists() else None
        if found == key:
            return True
        if found and resume:
            raise BadInput(
                f"cannot resume {self.folder}: since it was stopped, what it reads has changed "
                f"(its pieces have the key {found[:12]!r}..., now it is {key[:12]!r}...); put it "
                "back, or run without --resume to start again"
            )
        remove(self.folder)
        write_text(file, key)
        return False

    def has(self, name: str) -> bool:
        """Whether a piece is complete."""
        return hosts.first_does(lambda: (self.folder / name).exists())

    def drop(self, *names: str) -> None:
        """Remove pieces, once no process reads them any more; nothing there is fine."""
        hosts.wait_for_all("pieces are dropped")
        for name in names if hosts.first() else ():
            remove(self.folder / name)
            remove(self._sum(name))

    def _sum(self, name: str) -> Path:
        """The file beside the arrays of a piece that holds their CRC-32."""
        return self.folder / f"{name}.crc32"

    def _agreed(self, name: str, read: Callable[[], T]) -> T:
        """What `read` returns; where it finds the piece damaged in one process, all raise that."""
        found, damage = None, None
        try:
            found = read()
        except DamagedPiece as error:
            damage = error
        if hosts.any_asks(damage is not None):
            damage = damage or DamagedPiece(self.folder / name, "as another process reads it")
            damage.everywhere = True
            raise damage
        return cast(T, found)

    # arrays, batch by batch

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Callable[[Array], None]]:
        """Yields a function that appends an array; the piece is there when the block ends."""
        with contextlib.ExitStack() as stack:
            append = stack.enter_context(self._appending(name)) if hosts.first() else None

            def write(array: Array) -> None:
                whole = hosts.whole(array, everywhere=False)
                if append:
                    append(whole)

            yield write
        hosts.wait_for_all("a piece is written")

    @contextlib.contextmanager
    def _appending(self, name: str) -> Iterator[Callable[[Array], None]]:
        with replacing(self.folder / name) as work, open(work, "wb") as file:
            # Not a memory map: where the disk is full, writing to one kills the process.
            total = 0

            def append(array: Array) -> None:
                nonlocal total
                content = np.asarray(array).tobytes()
                total = zlib.crc32(content, total)
                file.write(content)

            yield append
            write_text(self._sum(name), str(total))

    def reading(self, name: str, shape: tuple[int, ...], dtype: str) -> Iterator[np.ndarray]:
        """The arrays `shape` of a piece, one after another.

        Raises:
          DamagedPiece: after the last array, where they are not those that were written.
        """
        total = 0
        kind = jnp.dtype(dtype)
        count = int(np.prod(shape)) * kind.itemsize
        with self._agreed(name, lambda: self._open(name)) as file:
            while content := file.read(count):
                total = zlib.crc32(content, total)
                if len(content) < count:
                    raise DamagedPiece(self.folder / name, "it ends inside an array")
                yield np.frombuffer(content, kind).reshape(shape)
        self._agreed(name, lambda: self._check(name, total))

    def mapped(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """All arrays of a piece as one of `shape`, a memory map of its file.

        Raises:
          DamagedPiece: they are not those that were written.
        """

        def read() -> np.ndarray:
            total = 0
            with self._open(name) as file:
                while content := file.read(1 << 24):
                    total = zlib.crc32(content, total)
            self._check(name, total)
            return np.memmap(self.folder / name, jnp.dtype(dtype), "r", shape=shape)

        return self._agreed(name, read)

    def check_size(self, name: str, size: int) -> None:
        """Raises DamagedPiece where a piece has not that many bytes."""

        def check() -> None:
            with self._open(name) as file:
                found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedPiece(self.folder / name, f"it has {found} of {size} bytes")

        self._agreed(name, check)

    def _open(self, name: str) -> BinaryIO:
        try:
            return open(self.folder / name, "rb")
        except OSError as error:
            raise DamagedPiece(self.folder / name, error.strerror or str(error)) from error

    def _check(self, name: str, total: int) -> None:
        """Raises DamagedPiece where the CRC-32 of a piece is not the one that was noted."""
        known = self._sum(name)
        if known.exists() and known.read_text(errors="replace") != str(total):
            raise DamagedPiece(self.folder / name, "its checksum differs")

    # packed blocks

    def write_block(
        self,
        name: str,
        packed: Mapping[str, Any],
        stats: Mapping[str, Stats] | None,
        record: Record,
        plain: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Keep the packed nodes `[1, i, o]` of a block, its statistics `[i]`, `[o]`, a record for
        JSON, and `plain` arrays `[1, ...]` such as norms that were tuned."""
        arrays = {f"{path}:{_PLAIN}": np.asarray(array) for path, array in (plain or {}).items()}
        for path, node in packed.items():
            arrays |= {f"{path}:{part}": array for part, array in named_parts(node).items()}
        for path, one in (stats or {}).items():
            arrays |= {f"{path}:s_in": np.asarray(one.s_in), f"{path}:s_out": np.asarray(one.s_out)}
        headers = {path: node.header() for path, node in packed.items()}
        metadata = {"headers": json.dumps(headers), "record": json.dumps(record)}
        self.write_arrays(name, arrays, metadata)

    def read_block(self, name: str) -> tuple[Params, dict[str, Stats] | None, Record]:
        """What `write_block` kept: nodes and plain arrays by path, statistics (None where there
        were none), and the record.

        Raises:
          DamagedPiece: the file cannot be read or is not what was written.
        """
        arrays, header = self.read_arrays(name)
        packed = {
            path: jax.tree.map(lambda part, p=path: arrays[f"{p}:{part}"],
                               part_names(abstract_packed(one)))
            for path, one in header["headers"].items()
        }
        stats = {p: Stats(arrays[f"{p}:s_in"], arrays[f"{p}:s_out"])
                 for p in packed if f"{p}:s_in" in arrays}
        ending = f":{_PLAIN}"
        plain = {key.removesuffix(ending): a for key, a in arrays.items() if key.endswith(ending)}
        return packed | plain, stats or None, header["record"]

    # arrays by name

    def write_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Keep arrays, and texts of JSON, with their checksums."""

        def write() -> None:
            sums = {name: checksum(np.asarray(array)) for name, array in arrays.items()}
            texts = dict(metadata or {})
            texts["sha256"] = json.dumps({**sums, **_sums(texts)})
            write_tensors(self.folder / name, dict(arrays), texts)

        hosts.first_does(write)

    def read_arrays(self, name: str) -> tuple[dict[str, Any], Json]:
        """What `write_arrays` kept, the texts parsed.

        Raises:
          DamagedPiece: the file cannot be read or is not what was written.
        """
        return self._agreed(name, lambda: _tensors(self.folder / name))

    # records

    def write_record(self, name: str, record: Record) -> None:
        """Keep a record as JSON."""
        hosts.first_does(lambda: write_record(self.folder / name, record))

    def record(self, name: str) -> Record | None:
        """A record, None where there is none or it was damaged and set aside."""
        return hosts.first_does(lambda: read_record(self.folder / name))


def _tensors(file: Path) -> tuple[dict[str, Any], Json]:
    """Arrays and parsed texts of a file of `Pieces.write_arrays`; raises DamagedPiece."""
    try:
        with safe_open(file, framework="numpy") as content:
            arrays = {key: content.get_tensor(key) for key in content.keys()}
            metadata = dict(content.metadata())
            header = {key: parse(text) for key, text in metadata.items()}
        sums = header.pop("sha256", None)  # blocks of 0.1 have none
        metadata.pop("sha256", None)
        found = {key: checksum(array) for key, array in arrays.items()} | _sums(metadata)
        if sums is not None and sums != found:
            raise ValueError("a checksum differs")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DamagedPiece(file, first_line(error)) from error
    return arrays, header


def _sums(metadata: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each text."""
    return {f"text {name}": text_checksum(text) for name, text in metadata.items()}
