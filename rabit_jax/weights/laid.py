"""Packed weights laid out for the device that multiplies them; what the decoding loop holds.

Bits of several matrices that read the same input are joined along the outputs, and on a CPU laid
so that its vector unit runs along them; codes of evenly spaced levels take a byte or half a byte.
Made from packed weights by `lay`, never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float, Int

from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.group_uniform import PackedGroupUniform
from rabit_jax.weights.grouped_sign import PackedGroupedSign
from rabit_jax.weights.low_rank_sign import PackedLowRank
from rabit_jax.weights.sign_paths import PackedSign, pack_positive
from rabit_jax.weights.uniform_sign import PackedUniformSign


@pytree_dataclass
class LaidSign:
    """Sign matrices of stacked layers, joined along their outputs.

    Attributes:
      bits: uint8 `[l, k, o, bytes]`, `o = sum(rows)`, or on a CPU what `laid_bits` makes of them.
      g: float16 `[l, k, o]`.
      h: float16 `[l, k, m, i]`, the input scales of each of the m matrices.
      rows: outputs of each matrix.
      limbs: bytes of fixed point per activation, see `kernels.activations`; 1 is that of
        `models.prepared.byte_activations`.
      short: whether many rows may be multiplied in bfloat16, as those of a bfloat16 model are.
    """

    bits: jax.Array
    g: jax.Array
    h: jax.Array
    rows: tuple[int, ...] = struct.field(pytree_node=False)
    limbs: int = struct.field(pytree_node=False, default=2)
    short: bool = struct.field(pytree_node=False, default=False)

    def matmul_at(
        self, x: Float[Array, "... i"], layer: Array, impl: str | None = None
    ) -> Float[Array, "... o"]:
        """`x @ [W_1 ... W_m]` of one layer: `[..., i]` -> `[..., o]`; nothing is copied."""
        from rabit_jax.kernels.matmul import packed_matmul

        return packed_matmul(x, self.bits, self.g, self.h, layer=layer, rows=self.rows,
                             limbs=self.limbs, impl=impl, short=self.short)


@pytree_dataclass
class LaidLowRank:
    """The factors of a `PackedLowRank`, both packed along the axis that is summed over.

    Attributes:
      u_bits: uint8 `[l, 1, c r, bytes of i]`, rows of `U^T`, or what `laid_bits` makes of them.
      v_bits: uint8 `[l, c, o, bytes of r]`, rows of `V^T`, or what `laid_bits` makes of them.
      h, l, g: float16 `[l, c, i]`, `[l, c, r]`, `[l, c, o]`.
      limbs: bytes of fixed point per activation.
    """

    u_bits: jax.Array
    v_bits: jax.Array
    h: jax.Array
    l: jax.Array
    g: jax.Array
    limbs: int = struct.field(pytree_node=False, default=2)

    def matmul_at(
        self, x: Float[Array, "... i"], layer: Array, impl: str | None = None
    ) -> Float[Array, "... o"]:
        """`x @ W_hat` of one layer: `[..., i]` -> `[..., o]`."""
        from rabit_jax.kernels.matmul import packed_low_rank_matmul

        return packed_low_rank_matmul(x, self.u_bits, self.v_bits, self.h, self.l, self.g,
                                      layer=layer, limbs=self.limbs, impl=impl)


@pytree_dataclass
class LaidTable:
    """`W_hat = (s table)^T`: one scale and 8-bit integers for each output, such as a token.

    Attributes:
      table: int8 `[o, i]`, or on a CPU what `laid_table` makes of it.
      scale: float32 `[o]`.
      limbs: bytes of fixed point per activation.
    """

    table: jax.Array
    scale: jax.Array
    limbs: int = struct.field(pytree_node=False, default=2)

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x W_hat` in float32: `[..., i]` -> `[..., o]`."""
        from rabit_jax.kernels.matmul import table_matmul

        return table_matmul(x, self.table, self.scale, self.limbs)


def lay_table(rows: Float[Array, "o i"], platform: str) -> LaidTable:
    """Rows `[o, i]`, one for each output, rounded to 8 bits: `s_o = max_i |w_oi| / 127`."""
    from rabit_jax.kernels.matmul import laid_table

    table, scale = _rounded(rows)
    return LaidTable(jax.jit(laid_table, static_argnums=1)(table, platform), scale)


@jax.jit
def _rounded(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = rows.astype(jnp.float32)
    top = jnp.max(jnp.abs(rows), axis=1)
    scale = jnp.where(top < 1e-30, 1.0, top / 127)
    return jnp.round(rows / scale[:, None]).astype(jnp.int8), scale


@pytree_dataclass
class LaidCodes:
    """Matrices of evenly spaced levels, of stacked layers, joined along their outputs.

    One of a single layer is also the table of an embedding, whose rows `lookup` reads.

    Attributes:
      codes: uint8 `[l, o, bytes]`, rows of `kernels.codes.lay_codes`, or on a CPU what
        `laid_codes` makes of them.
      s, c: float16 or float32 `[l, ceil(i / group), o]`, steps and lowest levels.
      group: inputs that share a step and a lowest level.
      inputs: `i`.
      limbs: bytes of fixed point per activation.
    """

    codes: jax.Array
    s: jax.Array
    c: jax.Array
    group: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)
    limbs: int = struct.field(pytree_node=False, default=2)

    def matmul_at(self, x: Float[Array, "... i"], layer: Array | int) -> Float[Array, "... o"]:
        """`x @ [W_1 ... W_m]` of one layer: `[..., i]` -> `[..., o]`; nothing is copied."""
        from rabit_jax.kernels.codes import codes_matmul

        return codes_matmul(x, self.codes, self.s, self.c, group=self.group, layer=layer,
                            limbs=self.limbs)

    def lookup(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b i"]:
        """Rows `W_hat[:, tokens]` of the first layer, `[*tokens, i]` float32; a token without a row
        reads NaN."""
        from rabit_jax.kernels.codes import rows_at, rows_of_codes

        flat = tokens.reshape(-1)
        codes = rows_at(self.codes, flat, self.inputs)
        s, c = (v.at[0, :, flat].get(mode="fill").T for v in (self.s, self.c))
        rows = rows_of_codes(codes, s, c, self.inputs, self.group)
        return rows.reshape(*tokens.shape, self.inputs)


@pytree_dataclass
class LaidGroupedSign:
    """Sign paths of stacked layers with scales of groups of inputs.

    A `PackedGroupedSign`; or on a CPU, joined along their outputs, matrices of at most 16 evenly
    spaced levels, one of a single layer being a table too.

    Attributes:
      bits: uint8 `[l, k, o, bytes]`, or on a CPU what `laid_grouped_signs` makes of them.
      g: float16 or float32 `[l, k, n, o]`.
      h: float16 `[l, k, i]`, or None for ones.
      c: float32 `[l, n, o]`, what is added to each weight of a group, or None for zeros.
      group: inputs that share an output scale.
      inputs: `i`.
      limbs, short: as of `LaidSign`.
    """

    bits: jax.Array
    g: jax.Array
    h: jax.Array | None
    c: jax.Array | None
    group: int = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)
    limbs: int = struct.field(pytree_node=False, default=2)
    short: bool = struct.field(pytree_node=False, default=False)

    def matmul_at(self, x: Float[Array, "... i"], layer: Array | int) -> Float[Array, "... o"]:
        """`x @ [W_1 ... W_m]` of one layer: `[..., i]` -> `[..., o]`; nothing is copied."""
        from rabit_jax.kernels.grouped_signs import grouped_signs_matmul

        return grouped_signs_matmul(x, self.bits, self.g, self.h, self.c, group=self.group,
                                    layer=layer, limbs=self.limbs, short=self.short)

    def lookup(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b i"]:
        """As that of `LaidCodes`."""
        from rabit_jax.kernels.grouped_signs import rows_at

        rows = rows_at(self.bits, self.g, self.h, self.c, tokens.reshape(-1), self.inputs,
                       self.group)
        return rows.reshape(*tokens.shape, self.inputs)


Laid: TypeAlias = LaidSign | LaidLowRank | LaidCodes | LaidGroupedSign


def joins(node: object) -> Hashable:
    """What packed weights have in common that `lay` can join; None for any other weight."""
    if isinstance(node, PackedSign):
        return node.k
    if isinstance(node, PackedUniformSign):
        return (node.k, node.group, "centred")
    return (node.planes, node.group) if isinstance(node, PackedGroupUniform) else None


def lay(
    nodes: Sequence[Any], platform: str, limbs: int = 2, short: bool = False
) -> Laid | None:
    """The packed weights that read one input, `[l, i, o]` each, as one laid weight.

    Args:
      nodes: one node, or several to be joined.
      platform: on a "cpu" the bits are laid for its vector unit, else they stay in rows.
      limbs: bytes of fixed point per activation for weights that do not say it themselves.
      short: whether many rows may be multiplied in bfloat16.

    Returns:
      None where they cannot be joined or have no kernel: several that are not all `PackedSign` of
      the same k, or `PackedGroupUniform` or `PackedUniformSign` of the same bits and group, or a
      node of another type.
    """
    from rabit_jax.kernels.grouped_signs import laid_grouped_signs
    from rabit_jax.kernels.matmul import laid_bits

    first = nodes[0]
    if all(isinstance(n, PackedSign) and n.k == first.k for n in nodes):
        bits = jnp.concatenate([n.bits for n in nodes], axis=-2)
        g = jnp.concatenate([n.g for n in nodes], axis=-1)
        h = jnp.stack([n.h for n in nodes], axis=-2)
        limbs = max(n.limbs or limbs for n in nodes)
        rows = tuple(n.shape[-1] for n in nodes)
        bits = laid_bits(bits, rows, h.shape[-1], platform)
        return LaidSign(bits, g, h, rows, limbs, short)
    evenly = isinstance(first, PackedGroupUniform | PackedUniformSign)
    if evenly and all(joins(n) == joins(first) for n in nodes):
        return _lay_evenly(nodes, platform, limbs, short)
    if len(nodes) == 1 and isinstance(first, PackedGroupedSign):
        inputs = first.shape[-2]
        bits = laid_grouped_signs(first.bits, inputs, first.group, platform)
        return LaidGroupedSign(bits, first.g, first.h, None, first.group, inputs, limbs, short)
    if len(nodes) == 1 and isinstance(first, PackedLowRank):
        lead, width = first.u_bits.shape[:-3], first.u_bits.shape[-1]
        u_bits = first.u_bits.reshape(*lead, 1, first.k * first.rank, width)
        v_bits = _turned(first.v_bits, first.shape[-1])
        u_bits = laid_bits(u_bits, (first.rank,) * first.k, first.shape[-2], platform)
        v_bits = laid_bits(v_bits, first.shape[-1:], first.rank, platform)
        return LaidLowRank(u_bits, v_bits, first.h, first.l, first.g, limbs)
    return None


def _lay_evenly(
    nodes: Sequence[Any], platform: str, limbs: int, short: bool
) -> LaidCodes | LaidGroupedSign:
    """Evenly spaced levels: sign paths where the kernel of a CPU takes so many, else codes."""
    from rabit_jax.kernels.codes import laid_codes, lay_codes
    from rabit_jax.kernels.grouped_signs import evenly_spaced, laid_grouped_signs, takes

    inputs, group = nodes[0].inputs, nodes[0].group
    planes, s, c = (jnp.concatenate(parts, axis=axis) for axis, parts in zip(
        (-2, -1, -1), zip(*map(_planes_and_levels, nodes), strict=True), strict=True))
    if takes(planes.shape[-3], inputs, group, platform):
        bits, g, c = evenly_spaced(planes, s, c)
        return LaidGroupedSign(laid_grouped_signs(bits, inputs, group, platform), g, None, c, group,
                               inputs, limbs, short)
    codes = laid_codes(_codes(planes, inputs, lay_codes), inputs, group, platform)
    return LaidCodes(codes, s, c, group, inputs, limbs)


def _planes_and_levels(
    node: PackedGroupUniform | PackedUniformSign,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Planes of codes `[l, b, o, bytes]`, steps and lowest levels `[l, n, o]`.

    Levels that are odd multiples of `u = 2^(1-k) s`, from `-(2^k - 1) u` on, lie 2 u apart; the
    first sign is the highest bit of the code. The lowest one wants more than 16 bits.
    """
    if isinstance(node, PackedGroupUniform):
        return node.bits, node.s, node.c
    unit = node.s.astype(jnp.float32) * 0.5 ** (node.k - 1)
    return node.bits[..., ::-1, :, :], 2 * unit, -(2**node.k - 1) * unit


@partial(jax.jit, static_argnums=(1, 2))
def _codes(planes: jax.Array, inputs: int, method: Callable) -> jax.Array:
    """Rows of codes of stacked layers, one layer at a time."""
    return jax.lax.map(lambda one: method(one, inputs), planes)


def _turned(v_bits: jax.Array, outputs: int) -> jax.Array:
    """Rows of `V`, `[l, c, r, bytes of o]` -> rows of `V^T`, `[l, c, o, bytes of r]`."""
    from rabit_jax.kernels.layout import unpack_bits

    return pack_positive(per_layer(lambda b: unpack_bits(b, outputs), v_bits).astype(bool))
