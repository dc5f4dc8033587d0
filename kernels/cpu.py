"""The packed product on a CPU: bit planes of the activations, AND and population count.

With 16 planes a weight costs 16 ANDs and 16 counts of one bit each, which the vector unit does for
512 weights at a time; unpacking a weight to a float costs a shift, a mask, a sign and an addition
for 8 or 16. Bits lie as `[k, words, o]`, so that vectors run along the outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .activations import bit_planes

# Words per turn of the loop: 4 share one pass over the weights of the planes.
UNROLL = 4
GROUP = 16


def signs_matmul(
    u: jax.Array, words: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...], limbs: int
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[k, o, i] u[b, k, m(o), i]` of one layer.

    Arguments and result as in `matmul.signs_matmul`; `words` are uint32 `[l, k, w, o]`.
    """
    planes = bit_planes(u, 8 * limbs)
    starts = [sum(rows[:m]) for m in range(len(rows))]

    def add_path(path, totals):
        def member(m, total):
            u_words = jax.lax.dynamic_index_in_dim(planes.words[:, :, m], path, 1, keepdims=False)
            sums = _count(words, u_words, (layer, path), starts[m], rows[m])
            pick = [jax.lax.dynamic_index_in_dim(a[:, :, m], path, 1, keepdims=False)
                    for a in (planes.totals, planes.scale)]
            scales = jax.lax.dynamic_slice(
                g, (layer, path, starts[m]), (1, 1, rows[m]))[0].astype(jnp.float32)
            value = _value(sums, pick[0])
            return total + scales * pick[1][:, None] * value

        return tuple(member(m, total) for m, total in enumerate(totals))

    zeros = tuple(jnp.zeros((u.shape[0], n), jnp.float32) for n in rows)
    return jnp.concatenate(jax.lax.fori_loop(0, u.shape[1], add_path, zeros), axis=-1)


def _count(
    words: jax.Array, u_words: jax.Array, place: tuple, start: int, rows: int
) -> list[list[jax.Array]]:
    """`sum_i bit * v` of `rows` outputs from `start`: int32 `[rows]` per batch row and 16 planes."""
    batch, planes, count = u_words.shape
    groups = [range(p, min(p + GROUP, planes)) for p in range(0, planes, GROUP)]

    def turn(t, sums):
        first = t * UNROLL
        shape = (1, 1, UNROLL, rows)
        w = jax.lax.dynamic_slice(words, (*place, first, start), shape)[0, 0]
        v = jax.lax.dynamic_slice_in_dim(u_words, first, UNROLL, 2)
        return [[sums[b][n] + _weighted(w, v[b], group, planes) for n, group in enumerate(groups)]
                for b in range(batch)]

    zeros = [[jnp.zeros(rows, jnp.int32) for _ in groups] for _ in range(batch)]
    return jax.lax.fori_loop(0, count // UNROLL, turn, zeros)


def _weighted(w: jax.Array, v: jax.Array, group: range, planes: int) -> jax.Array:
    """`sum_p 2^p popcount(w & v_p)` over a group of planes by Horner's rule, int32 `[rows]`."""
    total = None
    for p in reversed(group):
        counts = sum(jax.lax.population_count(w[n] & v[p, n]) for n in range(UNROLL))
        counts = counts.astype(jnp.int32)
        if total is None:
            total = -counts if p == planes - 1 else counts
        else:
            total = total + total + counts
    return total


def _value(sums: list[list[jax.Array]], totals: jax.Array) -> jax.Array:
    """`sum_i B v` from `sum_i bit v`, float32 `[b, rows]`: `2 bits.v - sum v`, groups joined.

    Each group is exact in int32 for up to 32,768 inputs.
    """
    value = jnp.zeros((len(sums), sums[0][0].shape[0]), jnp.float32)
    for n in range(len(sums[0])):
        exact = 2 * jnp.stack([row[n] for row in sums]) - totals[:, n, None]
        value = value + exact.astype(jnp.float32) * float(2 ** (GROUP * n))
    return value
