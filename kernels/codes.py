"""The product with evenly spaced levels: a byte or half a byte for each weight, levels per group.

    W_hat[i, o] = s[m, o] q[o, i] + c[m, o],   m = floor(i / group)

Codes lie in rows of one output, `[o, i]`, so a row of them is also the row of a table that a lookup
reads. A tile of rows is turned to float32 where the device's own product reads it: on a CPU one
that its cache holds, so that the memory gives the codes alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.kernels.tiles import matmul_by_tiles, part_of


def code_bytes(inputs: int, bits: int) -> int:
    """Bytes of one row of codes: one for each input, or one for two where 4 bits suffice."""
    return -(-inputs // 2) if bits <= 4 else inputs


def lay_codes(planes: jax.Array, inputs: int) -> jax.Array:
    """Bit planes `[..., b, o, 32 ceil(i / 256)]` -> rows of codes, uint8 `[..., o, code_bytes]`.

    Where two codes share a byte, byte j holds input j in its low half and input
    `ceil(i / 2) + j` in its high half.
    """
    bits = planes.shape[-3]
    codes = sum((unpack_bits(planes[..., p, :, :], inputs) << p for p in range(bits)),
                start=jnp.uint8(0))
    if bits > 4:
        return codes
    half = code_bytes(inputs, bits)
    high = jnp.pad(codes[..., half:], [(0, 0)] * (codes.ndim - 1) + [(0, 2 * half - inputs)])
    return codes[..., :half] | high << 4


def rows_of_codes(
    codes: jax.Array, s: jax.Array, c: jax.Array, inputs: int, group: int
) -> jax.Array:
    """`W_hat^T` of some outputs: codes `[t, code_bytes]`, levels `[n, t]` -> float32 `[t, i]`."""
    if codes.shape[-1] < inputs:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[:, :inputs]
    step, low = (jnp.repeat(v.T.astype(jnp.float32), group, axis=1)[:, :inputs] for v in (s, c))
    return step * codes.astype(jnp.float32) + low


def codes_matmul(
    x: jax.Array, codes: jax.Array, s: jax.Array, c: jax.Array, *, group: int,
    layer: jax.Array | int = 0,
) -> jax.Array:
    """`y[o] = sum_i (s[m, o] q[o, i] + c[m, o]) x[i]`, `m = floor(i / group)`, of one layer.

    Args:
      x: `[..., i]` float.
      codes: uint8 `[l, o, code_bytes]` of `lay_codes`.
      s, c: `[l, ceil(i / group), o]` float.
      group: inputs that share a step and a lowest level.
      layer: which of the stack; an int32 scalar. Only its rows are read.

    Returns:
      `[..., o]` in `x.dtype`; products and sums are float32.

    Raises:
      BadInput: shapes that do not fit.
    """
    i, (layers, o, width) = x.shape[-1], codes.shape
    wanted = (layers, -(-i // group), o)
    if s.shape != wanted or c.shape != wanted or width not in (i, -(-i // 2)):
        raise BadInput(f"codes {codes.shape}, s {s.shape} and c {c.shape} do not fit x {x.shape} "
                       f"with groups of {group}: wanted levels {wanted} and {i} or {-(-i // 2)} "
                       "bytes a row")
    layer = jnp.asarray(layer, jnp.int32)

    def rows_at(start: jax.Array, rows: int) -> jax.Array:
        step, low = (part_of(levels, layer, 2, start, rows) for levels in (s, c))
        return rows_of_codes(part_of(codes, layer, 1, start, rows), step, low, i, group)

    y = matmul_by_tiles(x.reshape(-1, i).astype(jnp.float32), o, rows_at)
    return y.astype(x.dtype).reshape(*x.shape[:-1], o)
