"""The int8 product as a Triton kernel, and what all Triton kernels here share.

They split the inputs over programs, so that even a small matrix is spread over the whole device. A
program writes its own partial sums, which the caller adds in a fixed order: no atomics, and the
same result every time. A matrix is read where it lies in a stack of layers and paths.

The loops have no masks. A tile that would reach over the end of the array is read from earlier
rows on; a block that would reach over the end of its row is read from earlier bytes on, and the
activations are laid so that bytes which come twice meet zeros the second time.

`ASM=False` replaces the inline assembly by plain operations, which Triton's interpreter can run.
"""

from __future__ import annotations

from rabit_jax.kernels.gpu.triton_call import jit, static, tl


@static
def sum_to(rows, m):
    """`sum_{n < m} rows[n]`, known at compile time."""
    return sum(rows[:m])


@static
def tiles_to(rows, m, tile):
    """`sum_{n < m} ceil(rows[n] / tile)`, known at compile time."""
    return sum(-(-n // tile) for n in rows[:m])


@static
def count(rows):
    """How many matrices there are, known at compile time."""
    return len(rows)


@jit
def tile_of(tile, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Matrix, first row and end of a tile: tiles never reach over the end of their matrix."""
    member = 0
    first = tile * TILE
    end = sum_to(ROWS, 1)
    for m in tl.static_range(1, count(ROWS)):
        here = tile >= tiles_to(ROWS, m, TILE)
        member = tl.where(here, m, member)
        first = tl.where(here, sum_to(ROWS, m) + (tile - tiles_to(ROWS, m, TILE)) * TILE, first)
        end = tl.where(here, sum_to(ROWS, m + 1), end)
    return member, first, tl.minimum(end, first + TILE)


@jit
def tile_start(first, OUTPUTS: tl.constexpr, TILE: tl.constexpr):
    """First row that a tile reads: its own, or one before where the array would end too early.

    A shift of the whole tile keeps its rows a fixed distance apart, so that one address serves
    them all; clamping each row would give every one an address of its own.
    """
    return tl.minimum(first, max(OUTPUTS - TILE, 0))


@jit
def tile_rows(offsets, OUTPUTS: tl.constexpr, TILE: tl.constexpr):
    """Rows after `tile_start`; the last one again where there are fewer than a tile."""
    if OUTPUTS >= TILE:
        rows = offsets
    else:
        rows = tl.minimum(offsets, OUTPUTS - 1)
    return rows


@jit
def block_start(n, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Where block n of a row begins: `min(n BLOCK, ROW - BLOCK)`, and 0 in rows below a block."""
    if ROW % BLOCK == 0:
        start = n * BLOCK
    else:
        start = tl.minimum(n * BLOCK, max(ROW - BLOCK, 0))
    return start


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
