"""Deployed forms with levels per group of inputs: bit planes and 16-bit levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rabit_jax.errors import BadInput
from rabit_jax.weights.cost import Cost
from rabit_jax.weights.groups import group_count, spread
from rabit_jax.weights.packed import SCALE_DTYPE, pack_positive
from rabit_jax.weights.ste import F32


class GroupedPlanes:
    """Mixin of weights with two levels per group of `group` inputs and `planes` planes of bits.

    Trained or packed, sizes and costs are those of the packed form.
    """

    def bits_per_weight(self) -> float:
        """Nominal bits per weight once packed, `planes + 32 n / i`; padding on disk comes on top
        where 256 does not divide i."""
        i = self.shape[-2]
        return self.planes + 32 * group_count(i, self.group) / i

    def deployed_bytes(self) -> int:
        """Bytes once packed, padding of the inputs to 256 included."""
        from rabit_jax.kernels.layout import packed_bytes

        *lead, i, o = self.shape
        return prod(lead) * o * (self.planes * packed_bytes(i) + 4 * group_count(i, self.group))

    def cost(self) -> Cost:
        """Cost per token, computed on the planes of {0, 1}.

        Additions: the inputs that a plane selects, `planes i o`, and one for each plane, group and
        output that joins the groups' sums, `planes n o`. Multiplications: the two levels of a group
        times its sums, `2 n o`. What is shared by all outputs, the sum of the inputs of a group, is
        left out; so are shifts.
        """
        *lead, i, o = self.shape
        layers, n = prod(lead), group_count(i, self.group)
        additions = layers * self.planes * (i + n) * o
        return Cost(layers * 2 * n * o, additions, 0, self.deployed_bytes())


@struct.dataclass
class PackedGroupUniform(GroupedPlanes):
    """`W_hat = s q + c` with the codes `q` as bit planes in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., bits, o, 32 ceil(i / 256)]`, plane p holds bit p of the codes.
      s: float16 `[..., n, o]` steps, `n = ceil(i / group)`.
      c: float16 `[..., n, o]` lowest levels.
      group: inputs that share a step and a lowest level.
      inputs: `i`.
    """

    bits: jax.Array
    s: jax.Array
    c: jax.Array
    group: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)

    @property
    def planes(self) -> int:
        """Bit planes that are stored."""
        return self.bits.shape[-3]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.s.shape[:-2], self.inputs, self.s.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is computed in float32 and rounded once to `x.dtype`."""
        return x @ self.dense().astype(x.dtype)

    def codes(self) -> jax.Array:
        """`q`, uint8 `[..., i, o]`, 0 to `2^bits - 1`."""
        return unpack_codes(self.bits, self.inputs)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        s, c = (spread(v.astype(F32), self.group, self.inputs) for v in (self.s, self.c))
        return s * self.codes() + c

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat` as its only term, float32 `[..., i, o]`."""
        yield self.dense()

    def roles(self) -> PackedGroupUniform:
        """Leaf names for the mesh."""
        return self.replace(bits="code", s="scale", c="level")

    def pack(self, name: str) -> PackedGroupUniform:
        """Itself: already packed."""
        return self

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "group_uniform", "in", "out", "bits",
        "group"}`."""
        i, o = self.shape[-2:]
        return {
            "type": "group_uniform",
            "in": i,
            "out": o,
            "bits": self.planes,
            "group": self.group,
        }

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> PackedGroupUniform:
        """The node of one matrix as shapes and dtypes, from its `header`."""
        i, o, group = header["in"], header["out"], header["group"]
        level = jax.ShapeDtypeStruct((group_count(i, group), o), SCALE_DTYPE)
        return cls(abstract_planes((header["bits"],), i, o), level, level, group, i)


@struct.dataclass
class PackedDualBinary(GroupedPlanes):
    """`W_hat = a_1 b_1 + a_2 b_2` with `b` in {0, 1} as bit planes in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., 2, o, 32 ceil(i / 256)]`.
      a: float16 `[..., 2, n, o]` levels, `n = ceil(i / group)`.
      group: inputs that share levels.
      inputs: `i`.
    """

    bits: jax.Array
    a: jax.Array
    group: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)

    @property
    def k(self) -> int:
        """Number of binary paths, each a plane of bits."""
        return 2

    planes = k

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.a.shape[:-3], self.inputs, self.a.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return x @ self.dense().astype(x.dtype)

    def paths(self) -> Iterator[jax.Array]:
        """`a_1 b_1` and `a_2 b_2`, float32 `[..., i, o]`."""
        for j in range(2):
            level = spread(self.a[..., j, :, :].astype(F32), self.group, self.inputs)
            yield level * unpack_codes(self.bits[..., j : j + 1, :, :], self.inputs)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return sum(self.paths())

    def roles(self) -> PackedDualBinary:
        """Leaf names for the mesh."""
        return self.replace(bits="code", a="level")

    def pack(self, name: str) -> PackedDualBinary:
        """Itself: already packed."""
        return self

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "dual_binary", "in", "out",
        "group"}`."""
        i, o = self.shape[-2:]
        return {"type": "dual_binary", "in": i, "out": o, "group": self.group}

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> PackedDualBinary:
        """The node of one matrix as shapes and dtypes, from its `header`."""
        i, o, group = header["in"], header["out"], header["group"]
        level = jax.ShapeDtypeStruct((2, group_count(i, group), o), SCALE_DTYPE)
        return cls(abstract_planes((2,), i, o), level, group, i)


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Codes below `2^bits`, uint8 `[..., i, o]` -> planes `[..., bits, o, 32 ceil(i / 256)]`."""
    return jnp.stack([pack_positive((codes >> p & 1).astype(bool)) for p in range(bits)], axis=-3)


def unpack_codes(bits: jax.Array, inputs: int) -> jax.Array:
    """Planes uint8 `[..., bits, o, 32 ceil(i / 256)]` -> codes uint8 `[..., i, o]`."""
    from rabit_jax.kernels.layout import unpack_bits

    planes = (unpack_bits(bits[..., p, :, :], inputs) << p for p in range(bits.shape[-3]))
    return jnp.swapaxes(sum(planes), -1, -2)


def abstract_planes(lead: tuple[int, ...], inputs: int, outputs: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of packed planes `[*lead, o, 32 ceil(i / 256)]`."""
    from rabit_jax.kernels.layout import packed_bytes

    return jax.ShapeDtypeStruct((*lead, outputs, packed_bytes(inputs)), jnp.uint8)


def to_half(values: jax.Array, label: str, name: str, scale: bool = False) -> jax.Array:
    """Round to float16 and check that 16 bits hold the values.

    Raises:
      BadInput: a value is or would become infinite or NaN, or, of a `scale`, 0, negative or
        subnormal; the message names the layer and the value.
    """
    wide, half = np.asarray(values, np.float32), values.astype(SCALE_DTYPE)
    rounded = np.asarray(half, np.float32)
    least = float(np.finfo(np.float16).tiny) if scale else -np.inf
    bad = np.argwhere(~(np.isfinite(rounded) & (rounded >= least)))
    if len(bad):
        what, wanted = ("scale", "6.1e-05 to 65504") if scale else ("level", "-65504 to 65504")
        raise BadInput(
            f"{name}: {what} {label}{bad[0].tolist()} is {wide[tuple(bad[0])]:.3g} ({len(bad)} of "
            f"{wide.size} leave what float16 holds here, {wanted}): train with a lower rate, or "
            "initialise this layer again"
        )
    return half
