"""The packed product with the one-bit tensor instruction: packed signs against packed bit planes.

For batches of up to 3 rows. The weights are not decoded at all: their words and those of the
activations' bit planes go to the instruction as they were loaded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS, bit_planes
from rabit_jax.kernels.gpu import triton_b1_kernel
from rabit_jax.kernels.gpu.self_test import passes
from rabit_jax.kernels.gpu.triton_call import capability, lay_inputs, partial_sums, splits

MAX_BATCH = 3
# Bytes of a row that a warp reads at a time.
BLOCK = 64
WARPS, UNROLL, STAGES = 4, 2, 2


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...], limbs: int
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]`, see `matmul`.

    Args:
      u: `[b, k, m, i]` float32, b at most 3.
      bits: `[l, k, o, bytes]` uint8 in the `rb256` layout.
      g: `[l, k, o]` float.
      layer: int32 scalar.
      rows: outputs of each of the m matrices.
      limbs: 2 or 3, for 16 or 24 bit planes.

    Returns:
      float32 `[b, o]`; sums over the inputs are exact.

    Raises:
      BadInput: the device is not an NVIDIA GPU, b is above 3, there are more than 32,768 inputs, or
        the kernel does not pass `works`.
    """
    if u.shape[0] > MAX_BATCH:
        raise BadInput(f"triton_b1 takes a batch of up to {MAX_BATCH} rows, this one has "
                       f"{u.shape[0]}: choose impl=None or \"triton_int8\"")
    if u.shape[-1] > PLANE_INPUTS:
        raise BadInput(f"triton_b1 sums up to {PLANE_INPUTS} inputs in 32 bits, this product has "
                       f"{u.shape[-1]}: choose impl=\"triton_int8\"")
    version = capability("triton_b1")
    if not works(version):
        raise BadInput("triton_b1 failed its self-test with the installed Triton, as its warning "
                       "said: choose impl=\"triton_int8\"")
    return product(u, bits, g, layer, rows, limbs, version)


@functools.cache
def works(version: int) -> bool:
    """Whether the first GPU, of compute capability `version`, computes a small product right.

    Which words a lane holds is the compiler's choice; nothing makes it that of the instruction.
    Tested once per process; False, with a warning that says why, where it fails.
    """
    return passes(functools.partial(product, version=version), "triton_b1", "triton_int8")


def product(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, version: int,
) -> jax.Array:
    """`signs_matmul` for a device of compute capability `version`, whatever this one is."""
    planes, total, scale = fragments(u, limbs, bits.shape[-1])
    constants, grid = plan(u.shape[0], bits.shape, rows, limbs)
    arrays = (layer.reshape(1), bits, planes, total, scale, g)
    return partial_sums(
        triton_b1_kernel.b1_partials, arrays, (grid[1], u.shape[0], g.shape[-1]), grid, WARPS,
        STAGES, version, constants)


def plan(
    batch: int, bits: tuple[int, ...], rows: tuple[int, ...], limbs: int
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The kernel's constants and its grid for bits of shape `[l, k, o, bytes]`."""
    tiles = 2 if bits[2] >= 16 * WARPS else 1
    row_tiles = sum(-(-n // (8 * tiles * WARPS)) for n in rows)
    parts = splits(row_tiles * bits[1], -(-bits[3] // BLOCK))
    constants = {
        "ROWS": rows, "ROW_BYTES": bits[3], "PATHS": bits[1], "SPLITS": parts, "BATCH": batch,
        "GROUPS": limbs - 1, "WARPS": WARPS, "TILES": tiles, "UNROLL": UNROLL, "ASM": True,
    }
    return constants, (row_tiles, bits[1] * parts, 1)


def fragments(
    u: jax.Array, limbs: int, row_bytes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` -> the kernel's planes int32 `[k, m, b, n, c, 256]`, total int32
    `[k, m, b, n]` and scale float32 `[k, m, b]`, n groups of 16 planes and c blocks of 512 inputs.

    Element `128 s + 16 p + 4 t + 2 k + h` of a block is word `4 t + 2 s + k` of plane `p + 8 h`.
    """
    made = bit_planes(lay_inputs(u, row_bytes, BLOCK), 8 * limbs)
    words = jax.lax.bitcast_convert_type(made.words, jnp.int32)
    groups = made.totals.shape[-1]
    words = jnp.pad(words, [(0, 0)] * 3 + [(0, 16 * groups - words.shape[3]), (0, 0)])
    # b k m n h p c t s k -> k m b n c s p t k h
    words = words.reshape(*words.shape[:3], groups, 2, 8, -1, 4, 2, 2)
    words = words.transpose(1, 2, 0, 3, 6, 8, 5, 7, 9, 4)
    planes = words.reshape(*words.shape[:5], 256)
    return planes, jnp.moveaxis(made.totals, 0, 2), jnp.moveaxis(made.scale, 0, 2)
