"""The packed product on a CPU: bit planes of the activations, AND and population count.

With 16 planes a weight costs 16 ANDs and 16 counts of one bit each, which the vector unit does for
256 or 512 weights at a time; to make a float of a weight and add it costs four steps for 8 or 16.
Bits lie as `[k, words, o]`, so that vectors run along the outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS, bit_planes


def signs_matmul(
    u: jax.Array, words: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int,
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[k, o, i] u[b, k, m(o), i]` of one layer.

    Arguments and result as in the docstring of `matmul`; `words` are uint32 `[l, k, w, o]`. With
    `v` the integers of `bit_planes`, `sum_i B v = 2 sum_i bit v - sum_i v`.
    """
    if u.shape[-1] > PLANE_INPUTS:
        raise BadInput(f"cpu got {u.shape[-1]} inputs and sums {PLANE_INPUTS} exactly at most: use "
                       "impl 'unpacked'")
    planes = bit_planes(u, 8 * limbs)
    weights = jnp.float32(2.0) ** (16 * jnp.arange(planes.totals.shape[-1]))
    totals = jnp.sum(planes.totals * weights.reshape(1, 1, 1, -1), axis=-1)
    g = jax.lax.dynamic_index_in_dim(g, layer, keepdims=False).astype(jnp.float32)

    def member(b: int, m: int) -> jax.Array:
        start = sum(rows[:m])
        bits = jax.lax.dynamic_slice(
            words, (layer, 0, 0, start), (1, *words.shape[1:3], rows[m]))[0]
        value = 2 * _bits_dot(bits, planes.words[b, :, m]) - totals[b, :, m, None]
        return jnp.sum(g[:, start : start + rows[m]] * planes.scale[b, :, m, None] * value, axis=0)

    return jnp.stack([
        jnp.concatenate([member(b, m) for m in range(len(rows))]) for b in range(u.shape[0])
    ])


def _bits_dot(bits: jax.Array, planes: jax.Array) -> jax.Array:
    """`sum_i bit_i v_i`: uint32 `[k, w, o]` and planes `[k, p, w]` -> float32 `[k, o]`.

    By Horner's rule over the planes, highest first. A word's sum fits int32, 32 * 2^24 at most. One
    expression over all words, then one sum: XLA keeps both in vectors, and copies no bits.
    """

    def counts(p: int) -> jax.Array:
        return jax.lax.population_count(bits & planes[:, p, :, None]).astype(jnp.int32)

    highest = planes.shape[1] - 1
    total = -counts(highest)
    for p in reversed(range(highest)):
        total = total + total + counts(p)
    return jnp.sum(total.astype(jnp.float32), axis=1)
