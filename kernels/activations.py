"""Activations as integers: int8 limbs and bit planes, what sign matrices are multiplied with.

A row `u` of activations becomes fixed point, `u ~ scale * v` with integers `|v| < 2^(8 n - 1)`, and
sums of signed integers are exact. With n = 2 the error of a product of 4,096 inputs whose largest
is 60 times their root mean square is below 1e-3, with n = 3 below 1e-5. With one byte each block of
256 inputs has a scale of its own, as in Q8_K of llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.kernels.layout import BLOCK, BLOCK_BYTES

RADIX = 256
# The sum of 16 bit planes of this many inputs fits an int32, whatever they are.
PLANE_INPUTS = 32768


class Limbs(NamedTuple):
    """`u = scale * v`, `v = sum_l q[l] 256^(n - 1 - l)`.

    Attributes:
      q: int8 `[..., n, i]`, the most significant limb first; low limbs are balanced.
      scale: float32 `[...]`.
      totals: int32 `[..., n]`, `sum_i q_i` of each limb.
    """

    q: jax.Array
    scale: jax.Array
    totals: jax.Array


class Planes(NamedTuple):
    """`u = scale * v` with the two's complement of `v`: plane p weighs `2^p`, the last `-2^p`.

    Attributes:
      words: uint32 `[..., p, w]`, packed in the order of `layout.pack_bits`; padding is 0.
      scale: float32 `[...]`.
      totals: int32 `[..., ceil(p / 16)]`, sums over i of the value of 16 planes each, the lowest
        first and each as if it began at weight 1.
    """

    words: jax.Array
    scale: jax.Array
    totals: jax.Array


def limbs(u: jax.Array, n: int) -> Limbs:
    """Float32 `u: [..., i]` -> n int8 limbs, n in 1..3; a NaN in a row makes its scale NaN."""
    # The largest value that balanced low limbs and a top limb of at most 127 can hold.
    largest = 127 * RADIX ** (n - 1) - (RADIX // 2 if n > 1 else 0)
    v, scale = _fixed_point(u, largest)
    rest, low = v, []
    for _ in range(n - 1):
        limb = ((rest + RADIX // 2) & (RADIX - 1)) - RADIX // 2
        low.append(limb)
        rest = (rest - limb) >> 8
    q = jnp.stack([rest, *reversed(low)], axis=-2)
    return Limbs(q.astype(jnp.int8), scale, jnp.sum(q, axis=-1))


def bit_planes(u: jax.Array, n: int) -> Planes:
    """Float32 `u: [..., i]` -> n bit planes, n = 16 or 24; a NaN in a row makes its scale NaN."""
    # Without the barrier XLA computes v again for each of the sums below.
    v, scale = jax.lax.optimization_barrier(_fixed_point(u, 2 ** (n - 1) - 1))
    groups = [v] if n == 16 else [v & 0xFFFF, v >> 16]
    totals = jnp.stack([jnp.sum(part, axis=-1) for part in groups], axis=-1)
    return Planes(_plane_words(v, n), scale, totals)


def rounded_blocks(u: jax.Array) -> jax.Array:
    """Activations of one byte with a scale for each block c of 256 inputs, as floats again.

        scale_c = max_{i in c} |u_i| / 127,   v_i = round(u_i / scale_c),   result_i = scale_c v_i

    Divisions are products with float32 reciprocals, halves round to even, and a block whose largest
    value is below 1e-30 has the scale 1 and so zeros: the integers of the native kernel, bit by
    bit. Each value is at most scale_c / 2 away. A NaN or an infinity makes its block NaN.

    Args:
      u: float `[..., i]`.

    Returns:
      float32 `[..., i]`.
    """
    i = u.shape[-1]
    padded = jnp.pad(u.astype(jnp.float32), [(0, 0)] * (u.ndim - 1) + [(0, -i % BLOCK)])
    blocks = padded.reshape(*u.shape[:-1], -1, BLOCK)
    # A maximum by vectors may drop a NaN, so it is asked for.
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    top = jnp.where(jnp.isnan(blocks).any(axis=-1, keepdims=True), jnp.nan, largest)
    scale = jnp.where(top < 1e-30, 1.0, top * np.float32(1 / 127))
    v = jnp.clip(jnp.round(blocks * (1 / scale)), -127, 127)
    return (scale * v).reshape(padded.shape)[..., :i]


def _plane_words(v: jax.Array, n: int) -> jax.Array:
    """int32 `v: [..., i]` -> uint32 `[..., n, w]`: bit p of every v, in the order of `pack_bits`.

    All planes in one expression of v, which a compiler turns into a single loop.
    """
    pad = -v.shape[-1] % BLOCK
    padded = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, pad)])
    blocks = padded.reshape(*v.shape[:-1], 1, -1, 8, BLOCK_BYTES)
    shifts = jnp.arange(n).reshape((1,) * (v.ndim - 1) + (n, 1, 1))
    bits = (((blocks[..., j, :] >> shifts) & 1) << j for j in range(8))
    rows = sum(bits, start=jnp.int32(0)).astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(rows.reshape(*rows.shape[:-1], -1, 4), jnp.uint32)
    return words.reshape(*words.shape[:-2], -1)


def _fixed_point(u: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
    """Integers `v: [..., i]` with `|v| <= largest`, and the scale `[...]` that makes them `u`."""
    # A maximum by vectors may drop a NaN, so it is asked for.
    top = jnp.where(jnp.isnan(u).any(axis=-1), jnp.nan, jnp.max(jnp.abs(u), axis=-1))
    # A row of zeros, or one so small that the scale would be subnormal, has any scale.
    scale = jnp.where(top < 1e-30, 1.0, top / largest)
    v = jnp.clip(jnp.round(u / scale[..., None]), -largest, largest)
    return v.astype(jnp.int32), scale
