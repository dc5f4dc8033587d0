"""Random weights to measure with, and their products in float64 on a sample of the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.experiments.bench.shapes import Shape
from rabit_jax.kernels.layout import BLOCK_BYTES, as_rows, pack_bits, packed_bytes
from rabit_jax.models.prepared import Rows, for_device
from rabit_jax.types import Array
from rabit_jax.weights.laid import LaidLowRank, LaidSign
from rabit_jax.weights.low_rank_sign import rank_for_bits

# How rows of bits are laid: `(uint8 [1, k, o, bytes], outputs of each matrix) -> bits`.
Lay: TypeAlias = Callable[[jax.Array, tuple[int, ...], int], jax.Array]  # bits, rows, inputs
T = TypeVar("T")
COPIES = 2  # of a low-rank weight, as LittleBit has with its residual twin
SPREAD = 0.3  # standard deviation of the logarithm of a scale
SMALL = 0.05


def dense(i: int, o: int, dtype: str) -> Array | Rows:
    """A normal matrix of variance `1 / i` in the form in which the decode engine multiplies it.

    Returns:
      `[i, o]`, or on a CPU with 16 bits `Rows` of `[o, i]`.
    """
    return for_device(normal((i, o), i**-0.5, dtype), jax.devices()[0].platform)


def normal(shape: tuple[int, ...], size: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Normal values of standard deviation `size`, the same every time.

    From NumPy: nothing need be compiled for each shape.
    """
    values = np.random.default_rng(1).standard_normal(shape, np.float32)
    return jnp.array((np.float32(size) * values).astype(dtype))


def signs(shape: Shape, k: int, lay: Lay) -> LaidSign:
    """A packed weight of random signs and scales, with a leading axis of one.

    Args:
      shape: its inputs and the outputs of its joined matrices.
      k: sign paths.
      lay: how the rows of bits are laid.
    """
    i, o, members = shape.inputs, shape.outputs, len(shape.rows)
    bits = lay(random_bits((k, o), i), shape.rows, i)
    g, h = scale((1, k, o), seed=2, size=i**-0.5), scale((1, k, members, i), seed=3)
    return LaidSign(bits, g, h, shape.rows, shape.limbs)


def low_rank(shape: Shape, bits: float, lay: Lay) -> LaidLowRank:
    """A packed low-rank weight of `bits` per weight, two copies, with a leading axis of one."""
    i, o = shape.inputs, shape.outputs
    r = rank_for_bits(i, o, bits, COPIES)
    u_bits = lay(random_bits((1, COPIES * r), i), (r,) * COPIES, i)
    v_bits = lay(random_bits((COPIES, o), r), (o,), r)
    h, l = scale((1, COPIES, i), seed=4), scale((1, COPIES, r), seed=5, size=i**-0.5)
    g = scale((1, COPIES, o), seed=6, size=r**-0.5)
    return LaidLowRank(u_bits, v_bits, h, l, g, shape.limbs)


def random_bits(lead: tuple[int, int], inputs: int) -> jax.Array:
    """Packed random signs `[1, *lead, bytes]`."""
    shape = (1, *lead, packed_bytes(inputs))
    rows = np.random.default_rng(2).integers(0, 256, shape, np.uint8)
    # Padding is 0, as every reader may assume.
    return jnp.array(rows & np.asarray(pack_bits(jnp.ones((1, inputs), bool))))


def scale(shape: tuple[int, ...], seed: int, size: float = 1.0) -> jax.Array:
    """Positive float16 scales around `size`, within the normal range of float16."""
    logarithms = SPREAD * np.random.default_rng(seed).standard_normal(shape)
    return jnp.array((size * np.exp(logarithms)).astype(np.float16))


def random_like(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Random values of that shape and dtype: bits, positive float16 scales, or small normals."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        bits = np.random.default_rng(7).integers(
            np.iinfo(leaf.dtype).min, np.iinfo(leaf.dtype).max, leaf.shape, leaf.dtype,
            endpoint=True)
        return jnp.array(bits)
    if leaf.dtype == jnp.float16:
        return scale(leaf.shape, seed=9, size=SMALL)
    return normal(leaf.shape, SMALL, leaf.dtype)


def another(weight: T) -> T:
    """The same values in buffers of their own."""
    return jax.tree.map(lambda a: jnp.array(a, copy=True), weight)


def exact_dense(w: Array | Rows, x: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """`x W` of `dense` in float64: `x: [b, i]` -> `[b, s]` for the outputs `[s]`."""
    columns = w.rows[outputs].T if isinstance(w, Rows) else w[:, outputs]
    return x @ np.asarray(columns, np.float64)


def exact_signs(w: LaidSign, x: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The product of `signs` in float64, one layer: `x: [b, i]` -> `[b, s]`."""
    i, (_, k, _) = x.shape[1], w.g.shape
    member = np.searchsorted(np.cumsum(w.rows), outputs, side="right")
    g, h = np.asarray(w.g[0][:, outputs], np.float64), np.asarray(w.h[0], np.float64)
    total = np.zeros((len(x), len(outputs)))
    bits = as_rows(w.bits, w.rows, i)
    for path in range(k):
        b = unpack(bits[0, path], i, outputs)
        total += g[path] * (x @ (h[path][member] * b).T)
    return total


def exact_low_rank(w: LaidLowRank, x: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The product of `low_rank` in float64: `x: [b, i]` -> `[b, s]`."""
    _, copies, r = w.l.shape
    h, l, g = (np.asarray(a[0], np.float64) for a in (w.h, w.l, w.g))
    total = np.zeros((len(x), len(outputs)))
    u_bits = as_rows(w.u_bits, (r,) * copies, x.shape[1])
    v_bits = as_rows(w.v_bits, w.g.shape[-1:], r)
    for c in range(copies):
        u = unpack(u_bits[0, 0], x.shape[1], np.arange(c * r, (c + 1) * r))
        v = unpack(v_bits[0, c], r, outputs)
        total += g[c, outputs] * (((x * h[c]) @ u.T * l[c]) @ v.T)
    return total


def unpack(bits: Array, inputs: int, rows: np.ndarray) -> np.ndarray:
    """Signs of some rows, -1 or 1 in float64 `[s, i]`, by NumPy and from the layout's text alone.

    `bits`: uint8 `[o, bytes]`; `rows`: `[s]`.
    """
    held = np.asarray(bits[rows])
    # Axes: row, block of 256 inputs, byte j, bit p; input 256 c + 32 p + j.
    ones = np.unpackbits(held.reshape(len(rows), -1, BLOCK_BYTES, 1), axis=-1, bitorder="little")
    ordered = np.swapaxes(ones, -1, -2).reshape(len(rows), -1)
    return ordered[:, :inputs] * 2.0 - 1.0
