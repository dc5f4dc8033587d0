"""The packed product with int8 tensor instructions: signs by mask, activations as int8 limbs.

For batches of up to 32 rows, where the kernel reads the weights as fast as memory gives them or
nearly so. Each row of the batch takes one column of the tensor instruction per limb.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from rabit_jax.errors import BadInput
from rabit_jax.kernels.gpu.device import capability, passes
from rabit_jax.kernels.gpu.triton_activations import limb_columns, limb_parts
from rabit_jax.kernels.gpu.triton_tiles import (
    Constants,
    block_start,
    count,
    jit,
    partial_sums,
    power,
    splits,
    sum_to,
    tile_of,
    tile_rows,
    tile_start,
    tl,
)

MAX_BATCH = 32


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
      stages: blocks of weights that are on their way at once.
    """

    tile: int
    block: int
    columns: int
    per_row: int
    chunks: int
    warps: int
    sums: int
    stages: int


def tiles(batch: int, limbs: int, row_bytes: int) -> Tiles:
    """The fastest of those tried on an H200; with few columns there are registers for all sums."""
    per_row = 2 if limbs == 2 else 4
    used = batch * per_row
    # Rows below a block are of 32, 64 or 96 bytes.
    most = 32 if row_bytes < 64 else 64 if row_bytes < 128 else 128
    if used <= 8:
        return Tiles(128, most, 8, per_row, 1, warps=4, sums=8, stages=2)
    if used <= 16:
        return Tiles(128, min(most, 64), 16, per_row, 1, warps=4, sums=4, stages=2)
    return Tiles(128, min(most, 64), 32, per_row, -(-used // 32), warps=4, sums=4, stages=4)


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


@functools.cache
def works(version: int) -> bool:
    """Whether the first GPU, of compute capability `version`, computes a small product right.

    Tested once per process; False, with a warning that says why, where it fails, as it does where
    Triton and jax-triton do not fit each other.
    """
    return passes(functools.partial(product, version=version), "triton_int8", "unpacked")


def product(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, version: int,
) -> jax.Array:
    """`signs_matmul` for a device of compute capability `version`, whatever this one is."""
    cut, constants, grid = plan(u.shape[0], bits.shape, rows, limbs)
    q, total, scale = limb_columns(
        u, limbs, bits.shape[-1], cut.block, cut.chunks * cut.columns, cut.per_row, version)
    arrays = (layer.reshape(1), bits, q, total, scale, g)
    return partial_sums(
        int8_partials, arrays, (grid[1], u.shape[0], g.shape[-1]), grid,
        cut.warps, cut.stages, version, constants)


def plan(
    batch: int, bits: tuple[int, ...], rows: tuple[int, ...], limbs: int
) -> tuple[Tiles, Constants, tuple[int, int, int]]:
    """Tiles, the kernel's constants and its grid for bits of shape `[l, k, o, bytes]`."""
    cut = tiles(batch, limbs, bits[3])
    row_tiles = sum(-(-n // cut.tile) for n in rows)
    parts = splits(row_tiles * bits[1] * cut.chunks, -(-bits[3] // cut.block))
    constants = {
        "ROWS": rows, "ROW_BYTES": bits[3], "PATHS": bits[1], "SPLITS": parts, "BATCH": batch,
        "LIMBS": cut.per_row, "COLUMNS": cut.columns, "CHUNKS": cut.chunks, "SUMS": cut.sums,
        "TILE": cut.tile, "BLOCK": cut.block, "PARTS": limb_parts(bits[3], cut.block),
        "ASM": True,
    }
    return cut, constants, (row_tiles, bits[1] * parts, cut.chunks)


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
    SUMS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ASM: tl.constexpr,
):
    """`y[z, b, o] = g[o] sum_c scale[c] (2 sum_i bit[o, i] q[c, i] - total[c])`, c of row b.

    One program makes TILE outputs of one path from one part of the inputs; z counts parts of
    paths. The signs are int8 0 or 2^p, which one mask takes out of four bytes at once.

    layer: int32 [1]; bits: uint8 [l, PATHS, o, ROW_BYTES]; q: int8 [PATHS, m, columns, inputs of
    all blocks], LIMBS columns for each row of the batch, CHUNKS times COLUMNS in all; total: int32
    [PATHS, m, PARTS, columns]; scale: float32 [PATHS, m, columns]; g: float [l, PATHS, o]; y:
    float32 [PATHS SPLITS, BATCH, o]. Sums are exact in int32.
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
    # The first part of the inputs takes off the totals of all.
    part = tl.arange(0, power(PARTS))[:, None]
    of_member = (path * MEMBERS + member) * PARTS + part
    held = total + (of_member * CHUNKS + tl.program_id(2)) * COLUMNS + columns[None, :]
    parts = tl.where(split == 0, PARTS, 0)
    sums = 2 * sums - tl.sum(tl.load(held, mask=part < parts, other=0), 0)[None, :]
    value = sums.to(tl.float32) * tl.load(scale + vector)[None, :]
    value = tl.sum(tl.reshape(value, (TILE, COLUMNS // LIMBS, LIMBS)), 2)
    rows += begin
    inside = (rows >= first) & (rows < end)
    row_scale = tl.load(g + matrix * OUTPUTS + rows, mask=inside, other=0).to(tl.float32)
    batch = tl.program_id(2) * (COLUMNS // LIMBS) + tl.arange(0, COLUMNS // LIMBS)
    place = (tl.program_id(1) * BATCH + batch)[None, :] * OUTPUTS + rows[:, None]
    tl.store(y + place, value * row_scale[:, None], mask=inside[:, None] & (batch < BATCH)[None, :])
