"""Products with a dense matrix that is made tile by tile from its packed form."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Float32 weights of a tile on a CPU: 4 MiB, which the caches of two cores hold.
TILE = 2**20


def matmul_by_tiles(
    x: jax.Array, outputs: int, rows_at: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """`x W` in float32, where `rows_at(start, rows)` makes `W[:, start : start + rows]^T`.

    On a CPU the tiles are small enough for its cache, so that memory gives the packed weights
    alone; any other device makes one tile of all outputs.

    Args:
      x: float32 `[b, i]`.
      outputs: o.
      rows_at: of an int32 scalar and a number of rows -> float32 `[rows, i]`.

    Returns:
      float32 `[b, o]`.
    """
    rows = outputs
    if jax.default_backend() == "cpu":
        rows = min(outputs, max(1, TILE // x.shape[-1]))

    def tile(n: jax.Array | int, y: jax.Array) -> jax.Array:
        # The last tile begins early enough to be whole.
        start = jnp.minimum(jnp.int32(n) * rows, outputs - rows)
        found = jnp.einsum("bi,ti->bt", x, rows_at(start, rows), precision="highest")
        return jax.lax.dynamic_update_slice(y, found, (0, start))

    y = jnp.zeros((x.shape[0], outputs), jnp.float32)
    count = -(-outputs // rows)
    return tile(0, y) if count == 1 else jax.lax.fori_loop(0, count, tile, y)


def part_of(
    array: jax.Array, layer: jax.Array, axis: int, start: jax.Array, rows: int
) -> jax.Array:
    """`rows` of one layer of `[l, ...]` from `start` along an axis; nothing else is read."""
    begin: list[jax.Array | int] = [0] * array.ndim
    size = list(array.shape)
    begin[0], size[0], begin[axis], size[axis] = layer, 1, start, rows
    return jax.lax.dynamic_slice(array, begin, size)[0]
