"""The packed product of large batches on a GPU: one kernel writes `W_hat`, a library multiplies.

Writing the matrix costs about as long as multiplying a few rows by it, so with many rows, such as
those of a prompt, it is nearly free, and the tensor cores do the rest.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.kernels.gpu.device import capability
from rabit_jax.kernels.gpu.triton_tiles import (
    Constants,
    call,
    count,
    jit,
    sum_to,
    tile_of,
    tile_rows,
    tile_start,
    tl,
)

# Rows of a program, whose 256 inputs are a block of the layout.
TILE, WARPS = 32, 4


def dense_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, layer: jax.Array,
    rows: tuple[int, ...],
) -> jax.Array:
    """`y = x W_hat`, the matrix rounded once to `x.dtype`; as `reference.unpacked_matmul`.

    Args:
      x: `[b, i]` float16, bfloat16 or float32.
      bits: `[l, k, o, bytes]` uint8 in the `rb256` layout.
      g: `[l, k, o]` float.
      h: `[l, k, m, i]` float.
      layer: int32 scalar.
      rows: outputs of each of the m matrices.

    Returns:
      float32 `[b, o]`.

    Raises:
      BadInput: the device is not an NVIDIA GPU.
    """
    w = dense_tile(bits, g, h, layer, rows, x.dtype, capability("triton_dense"))
    # Else float32 would be rounded to 10 bits of mantissa.
    return jnp.einsum("bi,oi->bo", x, w, precision="highest", preferred_element_type=jnp.float32)


def dense_tile(
    bits: jax.Array, g: jax.Array, h: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    dtype: jax.typing.DTypeLike, version: int,
) -> jax.Array:
    """`W_hat^T = sum_k diag(g_k) B_k diag(h_k)` of one layer, summed in float32 -> `[o, i]`."""
    out = jax.ShapeDtypeStruct((bits.shape[2], h.shape[-1]), dtype)
    constants, grid = plan(bits.shape, h.shape[-1], rows)
    arrays = layer.reshape(1), bits, g, h
    [w] = call(dense_rows, arrays, [out], grid, WARPS, 1, version, constants)
    return w


def plan(
    bits: tuple[int, ...], inputs: int, rows: tuple[int, ...]
) -> tuple[Constants, tuple[int, int, int]]:
    """The kernel's constants and its grid for bits of shape `[l, k, o, bytes]`."""
    constants = {"ROWS": rows, "ROW_BYTES": bits[3], "PATHS": bits[1], "INPUTS": inputs,
                 "TILE": TILE}
    return constants, (sum(-(-n // TILE) for n in rows), -(-inputs // 256), 1)


@jit
def dense_rows(
    layer, bits, g, h, w,
    ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, PATHS: tl.constexpr, INPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`w[o, i] = sum_k g[k, o] B[k, o, i] h[k, m(o), i]` for TILE rows and 256 inputs.

    layer: int32 [1]; bits: uint8 [l, PATHS, o, ROW_BYTES]; g: float [l, PATHS, o]; h: float
    [l, PATHS, m, INPUTS]; w: float [o, INPUTS].
    """
    MEMBERS: tl.constexpr = count(ROWS)
    OUTPUTS: tl.constexpr = sum_to(ROWS, MEMBERS)
    member, first, end = tile_of(tl.program_id(0), ROWS, TILE)
    begin = tile_start(first, OUTPUTS, TILE)
    rows = begin + tile_rows(tl.arange(0, TILE), OUTPUTS, TILE)
    byte = tl.arange(0, 32)
    block = tl.program_id(1)
    sums = (tl.zeros((TILE, 32), tl.float32),) * 8
    for path in tl.static_range(PATHS):
        matrix = tl.load(layer).to(tl.int64) * PATHS + path
        at = (matrix * OUTPUTS + rows)[:, None] * ROW_BYTES + block * 32 + byte[None, :]
        held = tl.load(bits + at)
        outer = tl.load(g + matrix * OUTPUTS + rows).to(tl.float32)
        new = ()
        for p in tl.static_range(8):
            column = block * 256 + 32 * p + byte
            inner = tl.load(h + (matrix * MEMBERS + member) * INPUTS + column,
                            mask=column < INPUTS, other=0).to(tl.float32)
            size = outer[:, None] * inner[None, :]
            new = new + (sums[p] + tl.where((held >> p) & 1 == 1, size, -size),)
        sums = new
    mine = (rows >= first) & (rows < end)
    for p in tl.static_range(8):
        column = block * 256 + 32 * p + byte
        place = w + rows.to(tl.int64)[:, None] * INPUTS + column[None, :]
        tl.store(place, sums[p].to(w.dtype.element_ty),
                 mask=mine[:, None] & (column < INPUTS)[None, :])
