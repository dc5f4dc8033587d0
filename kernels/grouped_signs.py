"""The product with sign paths whose output scales belong to groups of inputs.

    W_hat[i, o] = sum_k h[k, i] B[k, i, o] g[k, m, o] + c[m, o],   m = floor(i / group)

Levels that are evenly spaced are of this form, see `evenly_spaced`: a path for each bit of the
code. On a CPU the native kernel reads the signs in tiles, in which each group has words of its own;
elsewhere, and for groups that fill no words, W_hat is made tile by tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.cpu import calls
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.layout import (
    TILE,
    WORD,
    from_groups,
    from_stored,
    in_groups,
    pack_bits,
    packed_bytes,
    stored_bytes,
    to_tiles,
    unpack_bits,
)
from rabit_jax.kernels.tiles import matmul_by_tiles, part_of

PATHS = 4  # of the native kernel


def laid_grouped_signs(bits: jax.Array, inputs: int, group: int, platform: str) -> jax.Array:
    """uint8 `[l, k, o, bytes]` as that platform multiplies them fastest.

    On a CPU tiles uint32 `[l, t, k, w, 16]` where the native kernel is there and takes them; rows
    as they are anywhere else.
    """
    if not takes(bits.shape[-3], inputs, group, platform):
        return bits
    outputs = bits.shape[-2]

    def turned(rows: jax.Array) -> jax.Array:
        if group < inputs:
            rows = pack_bits(in_groups(unpack_bits(rows, inputs), group).astype(bool))
        return to_tiles(rows, (outputs,), inputs if group >= inputs else 8 * rows.shape[-1])

    return jax.jit(lambda layers: jax.lax.map(turned, layers))(bits)


def takes(k: int, inputs: int, group: int, platform: str) -> bool:
    """Whether the native kernel multiplies k paths in groups of inputs."""
    return (platform == "cpu" and k <= PATHS and (group >= inputs or group % WORD == 0)
            and library() is not None)


def evenly_spaced(
    planes: jax.Array, s: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes `q = sum_p 2^p b_p` of levels `s q + c` as signs: a path for each bit.

    With signs `B_p = 2 b_p - 1`: `s q + c = sum_p 2^(p-1) s B_p + (c + s (2^n - 1) / 2)`.

    Args:
      planes: uint8 `[l, n, o, bytes]` of n bits.
      s, c: float `[l, m, o]`.

    Returns:
      bits `[l, n, o, bytes]`, g float32 `[l, n, m, o]` and c float32 `[l, m, o]` of
      `grouped_signs_matmul`.
    """
    s, n = s.astype(jnp.float32), planes.shape[-3]
    powers = 2.0 ** (jnp.arange(n, dtype=jnp.float32) - 1)
    g = powers[None, :, None, None] * s[:, None]
    return planes, g, c.astype(jnp.float32) + s * (2**n - 1) / 2


def rows_of_signs(bits: jax.Array, g: jax.Array, h: jax.Array | None, inputs: int,
                  group: int) -> jax.Array:
    """`W_hat^T` of some outputs: bits `[k, t, bytes]`, g `[k, n, t]`, h `[k, i]` -> float32
    `[t, i]`; one path at a time."""
    total = jnp.zeros((bits.shape[1], inputs), jnp.float32)
    for path in range(bits.shape[0]):
        size = jnp.repeat(g[path].T.astype(jnp.float32), group, axis=1)[:, :inputs]
        size = size if h is None else size * h[path][None].astype(jnp.float32)
        total = total + jnp.where(unpack_bits(bits[path], inputs) == 1, size, -size)
    return total


def rows_at(
    bits: jax.Array, g: jax.Array, h: jax.Array | None, c: jax.Array | None, outputs: jax.Array,
    inputs: int, group: int,
) -> jax.Array:
    """`W_hat[:, outputs]^T` of the first layer, such as rows of an embedding.

    Args:
      bits: uint8 `[l, k, o, bytes]` or uint32 `[l, t, k, w, 16]` of `laid_grouped_signs`.
      g: `[l, k, n, o]`.
      h: `[l, k, i]` or None.
      c: `[l, n, o]` or None.
      outputs: int `[r]`; one that is not there gives NaN.
      inputs: i.
      group: inputs that share a scale.

    Returns:
      float32 `[r, i]`.
    """
    if bits.dtype == jnp.uint8:
        found = jnp.moveaxis(bits.at[0, :, outputs].get(mode="fill"), 1, 0)
    else:
        words = bits.at[0, outputs // TILE, :, :, outputs % TILE].get(mode="fill")  # [r, k, w]
        found = jnp.moveaxis(jax.lax.bitcast_convert_type(words, jnp.uint8), 1, 0)
        found = found.reshape(*found.shape[:2], -1)  # [k, r, bytes]
        if group < inputs:
            signs = from_groups(unpack_bits(found, 8 * found.shape[-1]), group, inputs)
            found = pack_bits(signs.astype(bool))
        else:
            found = from_stored(found, inputs)
    sizes = jnp.moveaxis(g.at[0, :, :, outputs].get(mode="fill"), 0, -1)  # [k, n, r]
    rows = rows_of_signs(found, sizes, None if h is None else h[0], inputs, group)
    if c is not None:
        low = c.at[0, :, outputs].get(mode="fill").astype(jnp.float32)
        rows = rows + jnp.repeat(low, group, axis=1)[:, :inputs]
    return rows


def grouped_signs_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array | None = None,
    c: jax.Array | None = None, *, group: int, layer: jax.Array | int = 0, limbs: int = 2,
    short: bool = False,
) -> jax.Array:
    """`y = x W_hat` of one layer.

    Args:
      x: `[..., i]` float.
      bits: uint8 `[l, k, o, bytes]` in the `rb256` layout, or what `laid_grouped_signs` makes of
        them.
      g: `[l, k, ceil(i / group), o]` float.
      h: `[l, k, i]` float; None stands for ones.
      c: `[l, ceil(i / group), o]` float; None stands for zeros.
      group: inputs that share an output scale.
      layer: which of the stack; an int32 scalar. Only its rows are read.
      limbs: bytes of fixed point per activation on the native kernel, 2 or 3.
      short: whether many rows may be multiplied in bfloat16 there.

    Returns:
      `[..., o]` in `x.dtype`; sums are float32 or exact integers.

    Raises:
      BadInput: shapes that do not fit.
    """
    i, o = x.shape[-1], g.shape[-1]
    _check(x, bits, g, h, c, group)
    layer = jnp.asarray(layer, jnp.int32)
    flat = x.reshape(-1, i).astype(jnp.float32)
    if bits.dtype == jnp.uint32:
        y = _native(flat, bits, g, h, group, layer, limbs, short or x.dtype == jnp.bfloat16)
    else:
        scales = None if h is None else jax.lax.dynamic_index_in_dim(h, layer, keepdims=False)

        def rows_at(start: jax.Array, rows: int) -> jax.Array:
            return rows_of_signs(part_of(bits, layer, 2, start, rows),
                                 part_of(g, layer, 3, start, rows), scales, i, group)

        y = matmul_by_tiles(flat, o, rows_at)
    if c is not None:
        y = y + offsets(flat, jax.lax.dynamic_index_in_dim(c, layer, keepdims=False), group)
    return y.astype(x.dtype).reshape(*x.shape[:-1], o)


def offsets(x: jax.Array, c: jax.Array, group: int) -> jax.Array:
    """`y[b, o] = sum_m c[m, o] sum_{i in m} x[b, i]` in float32."""
    batch, inputs = x.shape
    group = min(group, inputs)
    x = jnp.pad(x, ((0, 0), (0, -inputs % group)))
    sums = jnp.sum(x.reshape(batch, c.shape[0], group), axis=-1)
    return jnp.einsum("bm,mo->bo", sums, c.astype(jnp.float32), precision="highest")


def _native(
    x: jax.Array, tiles: jax.Array, g: jax.Array, h: jax.Array | None, group: int,
    layer: jax.Array, limbs: int, short: bool,
) -> jax.Array:
    """The product by the native CPU kernel, which sees groups as runs of words."""
    layers, k, n, o = g.shape
    words = group // WORD if n > 1 else 0
    if words:
        x, h = in_groups(x, group), None if h is None else in_groups(h, group)
    how = calls.arithmetic(x.shape[0], x.shape[1], k, limbs, short, calls.isa_in_use(), words)
    if h is None and how != calls.INTEGERS:
        h = jnp.ones((layers, k, x.shape[1]), g.dtype)
    if h is not None and h.dtype != g.dtype or g.dtype == jnp.bfloat16:
        g, h = g.astype(jnp.float32), None if h is None else h.astype(jnp.float32)
    return calls.signs_matmul(x, tiles, g, None if h is None else h[:, :, None], layer, (o,),
                              limbs, how, group=words)


def _check(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array | None, c: jax.Array | None,
    group: int,
) -> None:
    i, (layers, k, n, o) = x.shape[-1], g.shape
    held = (layers, k, o, packed_bytes(i))
    if bits.dtype == jnp.uint32:
        width = stored_bytes(i) if n == 1 else packed_bytes(n * group)
        held = (layers, -(-o // TILE), k, width // 4, TILE)
    wanted = {"bits": held, "g": (layers, k, -(-i // group), o), "h": (layers, k, i),
              "c": (layers, n, o)}
    for name, array in (("bits", bits), ("g", g), ("h", h), ("c", c)):
        if array is not None and array.shape != wanted[name]:
            raise BadInput(f"{name} {array.shape} does not fit x {x.shape} and g {g.shape} with "
                           f"groups of {group}: wanted {wanted[name]}")
