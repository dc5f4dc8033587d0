"""The notation of the axes of a weight's arrays, from which shapes and bytes follow.

Leading axes, of stacked layers, are never written. An axis is one of

    i, o, k, r, ...   a named size; i and o are the inputs and outputs of the matrix
    2                 a fixed size
    i//group          ceil(i / group), groups of consecutive inputs
    2^b               entries of a table that codes of b bits address
    k-1               one less than k
    i/8               signs along i, eight to a byte: 32 ceil(i / 256) bytes in the layout rb256,
                      8 ceil(i / 64) in a file
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.kernels.layout import packed_bytes, stored_bytes
from rabit_jax.types import Shape

Role = Literal["latent", "scale", "level", "sign", "code"]
Sizes = dict[str, int]

# What the packed form stores each role in.
PACKED_DTYPES = {"sign": jnp.uint8, "code": jnp.uint8, "scale": jnp.float16, "level": jnp.float16}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Role and axes of one array of a weight.

    Attributes:
      role: "latent", a large trainable array; "scale", a small one, kept positive; "level", a small
        one of either sign; "sign" and "code", bits and integers, which no training changes.
      axes: the axes behind those of the stacked layers, separated by spaces.
    """

    role: Role
    axes: str

    @property
    def names(self) -> list[str]:
        """The axes, one by one."""
        return self.axes.split()

    def shape(self, sizes: Sizes) -> Shape:
        """Shape of the array of one matrix."""
        return tuple(axis_size(axis, sizes) for axis in self.names)

    def packed_bits(self, sizes: Sizes) -> int:
        """Bits of the packed array of one matrix, without the padding of packed rows."""
        bits = 8 * jnp.dtype(PACKED_DTYPES[self.role]).itemsize
        rows, packed = [a for a in self.names if not _is_packed(a)], filter(_is_packed, self.names)
        for axis in packed:
            rows, bits = [*rows, axis.removesuffix("/8")], bits // 8
        return bits * prod(axis_size(axis, sizes) for axis in rows)

    def row_signs(self, sizes: Sizes) -> int:
        """Signs of one packed row; 0 for an array that is not packed."""
        last = self.names[-1] if self.axes else ""
        return axis_size(last.removesuffix("/8"), sizes) if _is_packed(last) else 0

    def stored_bytes(self, sizes: Sizes) -> int:
        """Bytes of the packed array of one matrix in a file."""
        one = self.outline(sizes)
        signs = self.row_signs(sizes)
        shape = (*one.shape[:-1], stored_bytes(signs)) if signs else one.shape
        return prod(shape) * np.dtype(one.dtype).itemsize

    def outline(self, sizes: Sizes) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the packed array of one matrix."""
        return jax.ShapeDtypeStruct(self.shape(sizes), PACKED_DTYPES[self.role])


def axis_size(axis: str, sizes: Sizes) -> int:
    """The size of an axis of this module's notation, from those of the named axes.

    Raises:
      KeyError: a name that `sizes` lacks.

    Example:
      >>> axis_size("i//group/8", {"i": 3000, "group": 4})
      96
    """
    if axis.isdigit():
        return int(axis)
    if _is_packed(axis):
        return packed_bytes(axis_size(axis.removesuffix("/8"), sizes))
    if "//" in axis:
        whole, group = axis.split("//")
        return -(-axis_size(whole, sizes) // axis_size(group, sizes))
    if "^" in axis:
        base, exponent = axis.split("^")
        return axis_size(base, sizes) ** axis_size(exponent, sizes)
    if axis.endswith("-1"):
        return axis_size(axis.removesuffix("-1"), sizes) - 1
    return sizes[axis]


def _is_packed(axis: str) -> bool:
    return axis.endswith("/8")
