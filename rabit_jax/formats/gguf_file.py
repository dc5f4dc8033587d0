"""The container of a GGUF file: its metadata, and its tensors row by row.

The header is parsed here, with a check of every length against the size of the file, because the
reader of the `gguf` package makes an array of every string and takes 20 seconds for a vocabulary of
262,144 tokens (this takes half of one). The quantised blocks are decoded by that package, and by
`gguf_blocks` where it knows the type but has no decoder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.formats.gguf_blocks import decode
from rabit_jax.formats.gguf_fields import check_fields, check_name
from rabit_jax.types import Json, Shape

MAGIC = b"GGUF"
VERSIONS = (2, 3)
PIECE_BYTES = 1 << 23
MOST_AXES = 4
# How llama.cpp names the files of a split model, counted from 1.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# struct codes of the scalar types by their number; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
      file: where it is stored.
      name: its name there.
      shape: as torch has it, the longest-strided axis first.
      type: number of its quantisation type.
      offset: of its first byte in the file.
      places: for each stored row where it belongs, int `[rows]`; None where rows are in place.
      added: what the file adds to every value.
    """

    file: Path
    name: str
    shape: Shape
    type: int
    offset: int
    places: np.ndarray | None = None
    added: float = 0.0

    @property
    def label(self) -> str:
        """The tensor and its file, for error messages."""
        return f"tensor {self.name} in {self.file}"

    @property
    def dtype(self) -> str:
        """Its quantisation type, such as Q4_K."""
        return type_name(self.type)

    def pieces(self) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        """Where rows of the first axis belong, and these rows as float32, of about `PIECE_BYTES`.

        Raises:
          BadInput: the file has become shorter, or cannot be read any more.
        """
        # Blocks lie along the last axis, so a vector is decoded as a whole.
        step = max(1, PIECE_BYTES // (4 * prod(self.shape[1:])))
        step = self.shape[0] if len(self.shape) == 1 else step
        for begin in range(0, self.shape[0], step):
            rows = slice(begin, min(begin + step, self.shape[0]))
            shape = (rows.stop - begin, *self.shape[1:])
            first = stored_bytes((begin, *self.shape[1:]), self.type)
            data = self._bytes(first, stored_bytes(shape, self.type))
            row_bytes = stored_bytes(self.shape[-1:], self.type)
            with np.errstate(all="ignore"):  # whoever reads the values looks for NaN and infinity
                values = _decoded(data.reshape(-1, row_bytes), self.type)
                values = values.reshape(shape) - np.float32(self.added)
            yield rows if self.places is None else self.places[rows], values

    def _bytes(self, begin: int, count: int) -> np.ndarray:
        try:
            found = np.fromfile(self.file, np.uint8, count, offset=self.offset + begin)
        except OSError as error:
            raise BadInput(f"cannot read {self.label} ({error}): fetch the file again") from error
        if found.size != count:
            raise BadInput(f"{self.label} ends after {found.size} of {count} bytes: the file is "
                           "truncated, fetch it again")
        return found


@dataclass(frozen=True)
class GGUFFile:
    """Header of a GGUF file.

    Attributes:
      path: the file.
      fields: metadata by key; arrays are lists.
      tensors: its tensors by name.
    """

    path: Path
    fields: Json
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file of version 2 or 3, little-endian.

    Of a split model the parts beside the file are read too: the metadata are those of the first
    part, the tensors those of all.

    Raises:
      BadInput: no such file, another format or version, a truncated or damaged header, a part of
        a split model that is missing or belongs to another one, or a tensor of a type that the
        `gguf` package does not decode.
    """
    file = _read_file(path)
    count = file.fields.get("split.count", 1)
    if count in (0, 1):
        return file
    parts = [_read_file(part) for part in _parts(path, count)]
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        found = part.fields.get("split.no"), part.fields.get("split.count")
        if found != (number, count) or tensors.keys() & part.tensors.keys():
            raise BadInput(f"{part.path} is not part {number + 1} of the {count} parts of a model "
                           "that its name says it is: fetch it again")
        tensors |= part.tensors
    return GGUFFile(parts[0].path, parts[0].fields, tensors)


def first_part(path: Path) -> Path:
    """The first part of a split model by the name of any part; any other path as it is.

    Raises:
      BadInput: a part whose first part is not beside it.
    """
    named = PART.fullmatch(path.name)
    if named is None:
        return path
    first = path.with_name(f"{named[1]}-00001-of-{named[3]}.gguf")
    if not first.is_file():
        raise BadInput(f"{path} is one of {int(named[3])} parts of a model, and {first.name} is "
                       "not beside it: fetch all parts into one folder")
    return first


def _parts(path: Path, count: int) -> list[Path]:
    """All parts of a split model by the path of one of them."""
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise BadInput(f"{path} is one of {count} parts of a model, which are found by their "
                       f"names: call it NAME-00001-of-{count:05d}.gguf, the others likewise")
    return [path.with_name(f"{named[1]}-{n:05d}-of-{named[3]}.gguf") for n in range(1, count + 1)]


def _read_file(path: Path) -> GGUFFile:
    """The header of one file."""
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, path, path.stat().st_size)
            fields, infos = reader.header()
            begin = _aligned(file.tell(), reader.alignment(fields))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    check_fields(fields, path)
    tensors = {}
    for name, shape, kind, offset in infos:
        tensor = GGUFTensor(path, name, shape, kind, begin + offset)
        _check_tensor(tensor, reader.size)
        if name in tensors:
            raise BadInput(f"{path} has two tensors of the name {name}: fetch it again")
        tensors[name] = tensor
    return GGUFFile(path, fields, tensors)


def stored_bytes(shape: Shape, kind: int) -> int:
    """Bytes of a tensor of that shape in a quantisation type.

    Raises:
      ValueError: a number that is no type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return prod(shape) // block * size


def type_name(kind: int) -> str:
    """The name of a quantisation type, such as Q4_K."""
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _check_tensor(tensor: GGUFTensor, size: int) -> None:
    """Raises BadInput for a type that cannot be decoded, or data beyond the end of the file."""
    name, block = type_name(tensor.type), _block(tensor.type)
    if not block:
        raise BadInput(f"unsupported type {name} of {tensor.label}: the gguf package does not "
                       "decode it")
    if tensor.shape[-1] % block:
        raise BadInput(f"{tensor.label} has rows of {tensor.shape[-1]}, wanted a multiple of "
                       f"{block} for {name}: fetch the file again")
    end = tensor.offset + stored_bytes(tensor.shape, tensor.type)
    if end > size:
        raise BadInput(f"{tensor.label} ends at byte {end} of a file of {size}: the file is "
                       "truncated, fetch it again")


@functools.cache
def _block(kind: int) -> int:
    """Values of a block of a quantisation type; 0 where nothing decodes it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        _decoded(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return 0
    return block


def _decoded(rows: np.ndarray, kind: int) -> np.ndarray:
    """Rows of blocks, uint8 `[o, bytes]` -> float32 `[o, i]`.

    Raises:
      NotImplementedError: neither the gguf package nor `gguf_blocks` decodes the type.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    own = decode(rows, type_name(kind))
    if own is not None:
        return own
    return dequantize(rows, GGMLQuantizationType(kind)).astype(np.float32)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Reader:
    """Reads the header of an open file; whatever runs over its end raises BadInput."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def header(self) -> tuple[Json, list[tuple[str, Shape, int, int]]]:
        """Metadata, and name, shape, type and relative offset of each tensor."""
        if self.file.read(4) != MAGIC:
            raise BadInput(f"{self.path} is no GGUF file: it does not begin with GGUF")
        (version,) = self.numbers("I")
        if version not in VERSIONS:
            raise BadInput(f"{self.path} has GGUF version {version}, supported are little-endian "
                           f"files of version {' and '.join(map(str, VERSIONS))}")
        tensors, pairs = self.numbers("QQ")
        self.fits(tensors + pairs, 12)
        fields: Json = {}
        for _ in range(pairs):
            key = self.string()
            check_name(key, "field", self.path)
            (kind,) = self.numbers("I")
            fields[key] = self.value(kind)
        return fields, [self.tensor() for _ in range(tensors)]

    def alignment(self, fields: Json) -> int:
        """Alignment of the data, in bytes."""
        found = fields.get("general.alignment", 32)
        if not isinstance(found, int) or found < 1:
            raise BadInput(f"{self.path} has general.alignment {found!r}, wanted a positive "
                           "integer")
        return found

    def tensor(self) -> tuple[str, Shape, int, int]:
        """The next tensor's description; the file lists axes from the innermost one."""
        name = self.string()
        check_name(name, "tensor", self.path)
        (axes,) = self.numbers("I")
        if not 1 <= axes <= MOST_AXES:
            raise BadInput(f"tensor {name} in {self.path} has {axes} axes, wanted 1 to {MOST_AXES}")
        shape = self.numbers(f"{axes}Q")
        kind, offset = self.numbers("IQ")
        if not all(0 < n <= 8 * self.size for n in shape):
            raise BadInput(f"tensor {name} in {self.path} has the shape {list(shape)}, which the "
                           "file cannot hold: fetch it again")
        return name, tuple(shape[::-1]), kind, offset

    def value(self, kind: int) -> object:
        """A value of the numbered type."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(self.scalar(kind))[0]
        (inner,) = self.numbers("I")
        (count,) = self.numbers("Q")
        if inner == _STRING:
            self.fits(count, 8)
            return [self.string() for _ in range(count)]
        if inner == _ARRAY:
            raise BadInput(f"{self.path} has arrays of arrays in its metadata, which are not read")
        self.fits(count, struct.calcsize("<" + self.scalar(inner)))
        return list(self.numbers(f"{count}{self.scalar(inner)}"))

    def scalar(self, kind: int) -> str:
        """struct code of a scalar type."""
        if kind not in _SCALARS:
            raise BadInput(f"{self.path} has metadata of the type {kind}, which GGUF does not "
                           "define: fetch it again")
        return _SCALARS[kind]

    def string(self) -> str:
        """A string: its length, then UTF-8."""
        (length,) = self.numbers("Q")
        self.fits(length, 1)
        return self.file.read(length).decode("utf-8", errors="replace")

    def numbers(self, code: str) -> tuple[int, ...]:
        """Numbers by a struct code."""
        data = self.file.read(struct.calcsize("<" + code))
        try:
            return struct.unpack("<" + code, data)
        except struct.error:
            raise BadInput(f"{self.path} ends inside its header: the file is truncated, fetch it "
                           "again") from None

    def fits(self, count: int, size: int) -> None:
        """Raises BadInput where `count` items of at least `size` bytes run over the end."""
        if count * size > self.size - self.file.tell():
            raise BadInput(f"{self.path} ends inside its header: the file is truncated or damaged, "
                           "fetch it again")
