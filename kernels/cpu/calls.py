"""The calls of the native CPU kernel: sign products and products with int8 tables.

Axes: b batch, l layers, k paths, m members, i in, o out, t tiles of 16 outputs, w words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS
from rabit_jax.kernels.cpu.library import Library, library
from rabit_jax.kernels.layout import TILE

INTEGERS, FLOAT32, BFLOAT16 = 0, 1, 2
# Rows up to which each k of 2-limb products is fastest as integers; measured on Zen 4 and Zen 5,
# see docs/how-to/cpu-kernel.md. Above, W_hat is expanded tile by tile and multiplied as floats.
INTEGER_ROWS = {1: 32, 2: 12, 3: 8, 4: 6}


def arithmetic(batch: int, inputs: int, k: int, limbs: int, short: bool) -> int:
    """How the kernel multiplies: `INTEGERS`, `FLOAT32` or `BFLOAT16`.

    Args:
      batch: rows of x.
      inputs: of the matrix.
      k: sign paths.
      limbs: bytes of fixed point.
      short: whether x is bfloat16, in which many rows are then multiplied too.
    """
    if inputs <= PLANE_INPUTS and batch <= INTEGER_ROWS[k] * 2 // limbs:
        return INTEGERS
    return BFLOAT16 if short else FLOAT32


def signs_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array | None, layer: jax.Array,
    rows: tuple[int, ...], limbs: int, how: int = INTEGERS, isa: str | None = None,
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] h[k, m(o), i] x[b, k, i]`.

    As integers: with `scale_k` and the integers `v_k` of `activations.bit_planes` of `x h_k`, in
    this order of float32 operations, `y += (g_k scale_k) float(sum_i B v_k)`. As floats: W_hat in
    float32 or bfloat16, sums in float32.

    Args:
      x: float32 `[b, i]`, or `[b, k, i]` where each path has its own; then only as integers.
      bits: uint8 `[l, k, o, bytes]`, or uint32 `[l, t, k, w, 16]` from `layout.to_tiles`.
      g: float16 or float32 `[l, k, o]`.
      h: the same dtype `[l, k, m, i]`; None stands for ones, then only as integers.
      layer: int32 scalar.
      rows: outputs of each of the m members.
      limbs: bytes of fixed point, 1 to 3.
      how: `INTEGERS`, `FLOAT32` or `BFLOAT16`.
      isa: an instruction set of `library().isas`; None takes the one in use.

    Returns:
      float32 `[b, o]`.
    """
    one = _library()
    if how == INTEGERS and x.shape[-1] > PLANE_INPUTS:
        raise BadInput(f"integers got {x.shape[-1]} inputs and sum {PLANE_INPUTS} exactly at most")
    h = jnp.zeros((*g.shape[:2], len(rows), 0), g.dtype) if h is None else h
    y = jax.ShapeDtypeStruct((x.shape[0], g.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call("rabit_signs_matmul", y, vmap_method="sequential")
    return call(x, bits, g, h, jnp.asarray(layer, jnp.int32), rows=np.asarray(rows, np.int64),
                limbs=np.int64(limbs), arithmetic=np.int64(how), isa=_isa(one, isa))


def table_matmul(
    x: jax.Array, tiles: jax.Array, scale: jax.Array, limbs: int = 2, isa: str | None = None
) -> jax.Array:
    """`y[b, o] = (scale[o] scale_x[b]) sum_i W[o, i] v[b, i]`, `v` the integers of x.

    Args:
      x: float32 `[b, i]`, made fixed point as by `activations.limbs`.
      tiles: int8 `[t, ceil(i / 4), 16, 4]` from `layout.to_table_tiles`.
      scale: float16 or float32 `[o]`.
      limbs: bytes of fixed point, 1 to 3.
      isa: as for `signs_matmul`.

    Returns:
      float32 `[b, o]`.
    """
    one = _library()
    y = jax.ShapeDtypeStruct((x.shape[0], scale.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("rabit_table_matmul", y, vmap_method="sequential")
    return call(x, tiles, scale, limbs=np.int64(limbs), isa=_isa(one, isa))


def _library() -> Library:
    found = library()
    if found is None:
        raise BadInput("there is no native CPU kernel here: choose impl=None, which takes what the "
                       "machine can do")
    return found


def _isa(found: Library, name: str | None) -> np.int64:
    return np.int64(found.isa if name is None else found.isas.index(name))


assert TILE == 16  # kTile of native/isa.h
