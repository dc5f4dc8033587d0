"""The product with sign paths whose output scales belong to groups of inputs.

    W_hat[i, o] = sum_k h[k, i] B[k, i, o] g[k, m, o],   m = floor(i / group)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import packed_bytes, unpack_bits
from rabit_jax.kernels.tiles import matmul_by_tiles, part_of


def rows_of_signs(bits: jax.Array, g: jax.Array, h: jax.Array, group: int) -> jax.Array:
    """`W_hat^T` of some outputs: bits `[k, t, bytes]`, g `[k, n, t]`, h `[k, i]` -> float32
    `[t, i]`; one path at a time."""
    inputs, total = h.shape[-1], jnp.zeros((bits.shape[1], h.shape[-1]), jnp.float32)
    for path in range(bits.shape[0]):
        size = jnp.repeat(g[path].T.astype(jnp.float32), group, axis=1)[:, :inputs]
        size = size * h[path][None].astype(jnp.float32)
        total = total + jnp.where(unpack_bits(bits[path], inputs) == 1, size, -size)
    return total


def grouped_signs_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, *, group: int,
    layer: jax.Array | int = 0,
) -> jax.Array:
    """`y = x W_hat` of one layer, tile by tile.

    Args:
      x: `[..., i]` float.
      bits: uint8 `[l, k, o, bytes]` in the `rb256` layout.
      g: `[l, k, ceil(i / group), o]` float.
      h: `[l, k, i]` float.
      group: inputs that share an output scale.
      layer: which of the stack; an int32 scalar. Only its rows are read.

    Returns:
      `[..., o]` in `x.dtype`; products and sums are float32.

    Raises:
      BadInput: shapes that do not fit.
    """
    i, (layers, k, o, width) = x.shape[-1], bits.shape
    wanted = (layers, k, -(-i // group), o)
    if g.shape != wanted or h.shape != (layers, k, i) or width != packed_bytes(i):
        raise BadInput(f"bits {bits.shape}, g {g.shape} and h {h.shape} do not fit x {x.shape} "
                       f"with groups of {group}: wanted g {wanted}, h {(layers, k, i)} and "
                       f"{packed_bytes(i)} bytes a row")
    layer = jnp.asarray(layer, jnp.int32)
    scales = jax.lax.dynamic_index_in_dim(h, layer, keepdims=False)

    def rows_at(start: jax.Array, rows: int) -> jax.Array:
        return rows_of_signs(part_of(bits, layer, 2, start, rows),
                             part_of(g, layer, 3, start, rows), scales, group)

    y = matmul_by_tiles(x.reshape(-1, i).astype(jnp.float32), o, rows_at)
    return y.astype(x.dtype).reshape(*x.shape[:-1], o)
