"""The packed product with int8 tensor instructions: signs by mask, activations as int8 limbs.

For batches of up to 32 rows, where the kernel reads the weights as fast as memory gives them or
nearly so. Each row of the batch takes one column of the tensor instruction per limb.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import RADIX
from rabit_jax.kernels.activations import limbs as to_limbs
from rabit_jax.kernels.gpu import triton_kernels
from rabit_jax.kernels.gpu.triton_call import capability, lay_inputs, partial_sums, splits

MAX_BATCH = 32
# Blocks of weights that are on their way at once.
STAGES = 3


class Tiles(NamedTuple):
    """How a product is cut.

    Attributes:
      tile: outputs of a program.
      block: bytes of a row that it reads at a time.
      columns: columns that it multiplies with; each row of the batch has `per_row` of them.
      per_row: the limbs, or a power of two above, for which columns can be summed in registers.
      chunks: programs that share the columns of all rows.
      warps: warps of a program.
      sums: accumulators, one for each bit of a byte or for two.
    """

    tile: int
    block: int
    columns: int
    per_row: int
    chunks: int
    warps: int
    sums: int


def tiles(batch: int, limbs: int, row_bytes: int) -> Tiles:
    """What fits the registers; with few columns, more rows and sums save integer instructions."""
    per_row = 2 if limbs == 2 else 4
    used = batch * per_row
    # Rows below a block are of 32, 64 or 96 bytes.
    most = 32 if row_bytes < 64 else 64 if row_bytes < 128 else 128
    if used <= 8:
        return Tiles(64, most, 8, per_row, 1, warps=2, sums=8)
    if used <= 16:
        return Tiles(32, most, 16, per_row, 1, warps=2, sums=8)
    return Tiles(64, min(most, 64), 32, per_row, -(-used // 32), warps=4, sums=4)


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...], limbs: int
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]`, see `matmul`.

    Args:
      u: `[b, k, m, i]` float32, b at most 32.
      bits: `[l, k, o, bytes]` uint8 in the `rb256` layout.
      g: `[l, k, o]` float.
      layer: int32 scalar.
      rows: outputs of each of the m matrices.
      limbs: 2 or 3 int8 limbs per activation.

    Returns:
      float32 `[b, o]`; sums over the inputs are exact.

    Raises:
      BadInput: the device is not an NVIDIA GPU, or b is above 32.
    """
    if u.shape[0] > MAX_BATCH:
        raise BadInput(f"triton_int8 takes a batch of up to {MAX_BATCH} rows, this one has "
                       f"{u.shape[0]}: choose impl=None or \"unpacked\"")
    return product(u, bits, g, layer, rows, limbs, capability("triton_int8"))


def product(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, version: int,
) -> jax.Array:
    """`signs_matmul` for a device of compute capability `version`, whatever this one is."""
    q, total, scale = columns_of(u, limbs, bits.shape[-1])
    cut, constants, grid = plan(u.shape[0], bits.shape, rows, limbs)
    arrays = (layer.reshape(1), bits, q, total, scale, g)
    return partial_sums(
        triton_kernels.int8_partials, arrays, (grid[1], u.shape[0], g.shape[-1]), grid,
        cut.warps, STAGES, version, constants)


def plan(
    batch: int, bits: tuple[int, ...], rows: tuple[int, ...], limbs: int
) -> tuple[Tiles, dict[str, Any], tuple[int, int, int]]:
    """Tiles, the kernel's constants and its grid for bits of shape `[l, k, o, bytes]`."""
    cut = tiles(batch, limbs, bits[3])
    row_tiles = sum(-(-n // cut.tile) for n in rows)
    parts = splits(row_tiles * bits[1] * cut.chunks, -(-bits[3] // cut.block))
    constants = {
        "ROWS": rows, "ROW_BYTES": bits[3], "PATHS": bits[1], "SPLITS": parts, "BATCH": batch,
        "LIMBS": cut.per_row, "COLUMNS": cut.columns, "CHUNKS": cut.chunks, "SUMS": cut.sums,
        "TILE": cut.tile, "BLOCK": cut.block, "ASM": True,
    }
    return cut, constants, (row_tiles, bits[1] * parts, cut.chunks)


def columns_of(u: jax.Array, limbs: int, row_bytes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` -> the kernel's q int8 `[k, m, c, inputs]`, total int32 and scale float32
    `[k, m, c]`: `Tiles.per_row` columns for each row, and columns of 0 to fill the chunks."""
    cut = tiles(u.shape[0], limbs, row_bytes)
    made = to_limbs(lay_inputs(u, row_bytes, cut.block), limbs)
    weights = jnp.asarray([float(RADIX) ** (limbs - 1 - n) for n in range(limbs)], jnp.float32)
    scale = made.scale[..., None] * weights.reshape(1, 1, 1, -1)
    more = [(0, cut.chunks * cut.columns // cut.per_row - u.shape[0]), (0, cut.per_row - limbs)]

    def lay(array):
        array = jnp.moveaxis(array, 0, 2)
        array = jnp.pad(array, [(0, 0), (0, 0), *more, *[(0, 0)] * (array.ndim - 4)])
        return array.reshape(*array.shape[:2], -1, *array.shape[4:])

    return lay(made.q), lay(made.totals), lay(scale)
