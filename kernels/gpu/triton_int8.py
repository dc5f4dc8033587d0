"""The packed product with int8 tensor instructions: signs by mask, activations as int8 limbs.

For batches of up to 32 rows, where the kernel reads the weights as fast as memory gives them or
nearly so. Each row of the batch takes one column of the tensor instruction per limb.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import RADIX
from rabit_jax.kernels.activations import limbs as to_limbs
from rabit_jax.kernels.gpu.device import capability
from rabit_jax.kernels.gpu.triton_tiles import (
    block_start,
    count,
    jit,
    lay_inputs,
    partial_sums,
    splits,
    sum_to,
    tile_of,
    tile_rows,
    tile_start,
    tl,
)

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
        int8_partials, arrays, (grid[1], u.shape[0], g.shape[-1]), grid,
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


@jit
def _select(w, BIT: tl.constexpr):
    """Byte by byte 2^BIT where the bit is set, and -128 for the last bit."""
    return (w & (1 << BIT)).to(tl.int8)


@jit
def _upper(w, ASM: tl.constexpr):
    """Bytes whose low four bits are the high four of `w`; with ASM the others are left over.

    Shifting the bytes as such, the compiler would take every one out of its register.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 4;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (w >> 4).to(tl.int8)


@jit
def _int8_block(w, q, acc, SUMS: tl.constexpr, ASM: tl.constexpr):
    """Adds a block of bytes, `acc[p] += 2^p sum bit_p q`: each bit its own sum, or p and p + 4 one.

    Eight sums need no shift but twice the registers. The limbs are read with the inputs contiguous
    and turned here: the other way costs a load per byte.
    """
    new = ()
    if SUMS == 4:
        upper = _upper(w, ASM)
    for p in tl.static_range(SUMS):
        limbs = tl.trans(tl.load(q + 32 * p))
        sums = tl.dot(_select(w, p), limbs, acc[p], out_dtype=tl.int32)
        if SUMS == 4:
            limbs = tl.trans(tl.load(q + 32 * (p + 4)))
            sums = tl.dot(_select(upper, p), limbs, sums, out_dtype=tl.int32)
        new = new + (sums,)
    return new


@jit
def int8_partials(
    layer, bits, q, total, scale, g, y,
    ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, PATHS: tl.constexpr, SPLITS: tl.constexpr,
    BATCH: tl.constexpr, LIMBS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    SUMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):
    """`y[z, b, o] = g[o] sum_c scale[c] (2 sum_i bit[o, i] q[c, i] - total[c])`, c of row b.

    One program makes TILE outputs of one path from one part of the inputs; z counts parts of
    paths. The signs are int8 0 or 2^p, which one mask takes out of four bytes at once.

    layer: int32 [1]; bits: uint8 [l, PATHS, o, ROW_BYTES]; q: int8 [PATHS, m, columns, inputs of
    all blocks], LIMBS columns for each row of the batch, CHUNKS times COLUMNS in all; total: int32
    and scale: float32 [PATHS, m, columns]; g: float [l, PATHS, o]; y: float32 [PATHS SPLITS, BATCH,
    o]. Sums are exact in int32.
    """
    MEMBERS: tl.constexpr = count(ROWS)
    OUTPUTS: tl.constexpr = sum_to(ROWS, MEMBERS)
    BLOCKS: tl.constexpr = (ROW_BYTES + BLOCK - 1) // BLOCK
    path = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    member, first, end = tile_of(tl.program_id(0), ROWS, TILE)
    begin = tile_start(first, OUTPUTS, TILE)
    rows = tile_rows(tl.arange(0, TILE), OUTPUTS, TILE)
    columns = tl.arange(0, COLUMNS)
    byte = tl.arange(0, BLOCK)
    matrix = tl.load(layer).to(tl.int64) * PATHS + path
    vector = ((path * MEMBERS + member) * CHUNKS + tl.program_id(2)) * COLUMNS + columns
    w = bits + (matrix * OUTPUTS + begin) * ROW_BYTES
    w += (rows * ROW_BYTES)[:, None] + byte[None, :]
    x = q + (vector * (BLOCKS * BLOCK * 8))[:, None] + (byte // 32 * 256 + byte % 32)[None, :]
    zero = tl.zeros((TILE, COLUMNS), tl.int32)
    acc = (zero,) * SUMS
    start = split * BLOCKS // SPLITS
    x += start * (8 * BLOCK)
    for n in tl.range(start, (split + 1) * BLOCKS // SPLITS):
        here = tl.load(w + block_start(n, ROW_BYTES, BLOCK))
        acc = _int8_block(here, x, acc, SUMS, ASM)
        x += 8 * BLOCK
    sums = acc[0]
    for p in tl.static_range(1, SUMS):
        # The mask of the last bit is the int8 -128.
        sums += (-acc[p] if p == 7 else acc[p]) >> p
    sums = 2 * sums - tl.where(split == 0, tl.load(total + vector), 0)[None, :]
    part = sums.to(tl.float32) * tl.load(scale + vector)[None, :]
    part = tl.sum(tl.reshape(part, (TILE, COLUMNS // LIMBS, LIMBS)), 2)
    rows += begin
    inside = (rows >= first) & (rows < end)
    row_scale = tl.load(g + matrix * OUTPUTS + rows, mask=inside, other=0).to(tl.float32)
    batch = tl.program_id(2) * (COLUMNS // LIMBS) + tl.arange(0, COLUMNS // LIMBS)
    place = (tl.program_id(1) * BATCH + batch)[None, :] * OUTPUTS + rows[:, None]
    tl.store(y + place, part * row_scale[:, None], mask=inside[:, None] & (batch < BATCH)[None, :])
