"""The product with evenly spaced levels: a byte or half a byte for each weight, levels per group.

    W_hat[i, o] = s[m, o] q[o, i] + c[m, o],   m = floor(i / group)

Codes lie in rows of one output, `[o, i]`, so a row of them is also the row of a table that a lookup
reads. On a CPU the native kernel reads bytes in tiles of 16 rows. Elsewhere a tile of rows is
turned to float32 where the device's own product reads it: on a CPU one that its cache holds, so
that the memory gives the codes alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.cpu import calls
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.grouped_signs import offsets
from rabit_jax.kernels.layout import TILE, to_table_tiles, unpack_bits
from rabit_jax.kernels.tiles import matmul_by_tiles, part_of

MIDDLE = 128  # what codes of 8 bits are stored less of in tiles, so that they are signed bytes


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


def laid_codes(codes: jax.Array, inputs: int, group: int, platform: str) -> jax.Array:
    """Rows of `lay_codes` `[..., o, code_bytes]` as that platform multiplies them fastest.

    On a CPU codes of a byte become tiles int8 `[..., t, ceil(i / 4), 16, 4]` of `q - 128` where the
    native kernel is there and takes the groups; rows as they are anywhere else.
    """
    whole = codes.shape[-1] == inputs and (group >= inputs or group % 4 == 0)
    if platform != "cpu" or not whole or library() is None:
        return codes
    return to_table_tiles((codes ^ MIDDLE).astype(jnp.int8))


def rows_of_codes(
    codes: jax.Array, s: jax.Array, c: jax.Array, inputs: int, group: int
) -> jax.Array:
    """`W_hat^T` of some outputs: codes `[t, code_bytes]`, levels `[n, t]` -> float32 `[t, i]`."""
    if codes.shape[-1] < inputs:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[:, :inputs]
    step, low = (jnp.repeat(v.T.astype(jnp.float32), group, axis=1)[:, :inputs] for v in (s, c))
    return step * codes.astype(jnp.float32) + low


def rows_at(codes: jax.Array, outputs: jax.Array, inputs: int) -> jax.Array:
    """Rows `[r, code_bytes]` of the outputs `[r]` of the first layer of `laid_codes`."""
    if codes.dtype == jnp.uint8:
        return codes.at[0, outputs].get(mode="fill")
    rows = codes.at[0, outputs // TILE, :, outputs % TILE].get(mode="fill")
    return rows.reshape(rows.shape[0], -1)[:, :inputs].astype(jnp.uint8) ^ MIDDLE


def codes_matmul(
    x: jax.Array, codes: jax.Array, s: jax.Array, c: jax.Array, *, group: int,
    layer: jax.Array | int = 0, limbs: int = 2,
) -> jax.Array:
    """`y[o] = sum_i (s[m, o] q[o, i] + c[m, o]) x[i]`, `m = floor(i / group)`, of one layer.

    Args:
      x: `[..., i]` float.
      codes: uint8 `[l, o, code_bytes]` of `lay_codes`, or what `laid_codes` makes of them.
      s, c: `[l, ceil(i / group), o]` float.
      group: inputs that share a step and a lowest level.
      layer: which of the stack; an int32 scalar. Only its rows are read.
      limbs: bytes of fixed point per activation on the native kernel, 1 to 3.

    Returns:
      `[..., o]` in `x.dtype`; products and sums are float32, or integers in the native kernel.

    Raises:
      BadInput: shapes that do not fit.
    """
    i, (layers, n, o) = x.shape[-1], s.shape
    tiles = codes.dtype == jnp.int8
    held = ((layers, -(-o // TILE), -(-i // 4), TILE, 4),) if tiles else (
        (layers, o, i), (layers, o, -(-i // 2)))
    if n != -(-i // group) or c.shape != s.shape or codes.shape not in held:
        raise BadInput(f"codes {codes.shape}, s {s.shape} and c {c.shape} do not fit x {x.shape} "
                       f"with groups of {group}: wanted levels {(layers, -(-i // group), o)} and "
                       f"codes {' or '.join(map(str, held))}")
    layer = jnp.asarray(layer, jnp.int32)
    flat = x.reshape(-1, i).astype(jnp.float32)
    if tiles:
        y = _native(flat, codes, s, c, group, layer, limbs)
        return y.astype(x.dtype).reshape(*x.shape[:-1], o)

    def some(start: jax.Array, rows: int) -> jax.Array:
        step, low = (part_of(levels, layer, 2, start, rows) for levels in (s, c))
        return rows_of_codes(part_of(codes, layer, 1, start, rows), step, low, i, group)

    y = matmul_by_tiles(flat, o, some)
    return y.astype(x.dtype).reshape(*x.shape[:-1], o)


def _native(
    x: jax.Array, tiles: jax.Array, s: jax.Array, c: jax.Array, group: int, layer: jax.Array,
    limbs: int,
) -> jax.Array:
    """`s (q - 128)` by the kernel for tables of signed bytes, and `c + 128 s` by sums of groups."""
    step, low = (jax.lax.dynamic_index_in_dim(v, layer, keepdims=False).astype(jnp.float32)
                 for v in (s, c))
    if s.dtype not in (jnp.float16, jnp.float32):
        s = s.astype(jnp.float32)
    y = calls.table_matmul(x, tiles, s, limbs, group=group if s.shape[1] > 1 else 0, layer=layer)
    return y + offsets(x, low + MIDDLE * step, group)
