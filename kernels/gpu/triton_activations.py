"""Activations as the Triton kernels of the packed product take them, each made by one kernel.

As plain array operations the same takes about six small kernels in front of every product, which
on a large GPU cost more than the product. Here every program reads its whole row of activations
for the largest value of it, and then lays its own part.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.kernels.gpu.triton_tiles import call, jit, static, tl

WARPS = 8
# Inputs that a program reads at a time, and those that it lays as limbs.
CHUNK, LIMB_INPUTS = 16384, 1024
# Bytes of a row of bits that the one-bit kernel reads at a time: 512 inputs.
PLANE_BYTES = 64


def plane_fragments(
    u: jax.Array, limbs: int, row_bytes: int, version: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` float32 -> bit planes in the order of the one-bit tensor instruction.

    Args:
      u: the activations, scaled by each path.
      limbs: 2 or 3, for 16 or 24 planes; the same integers as `activations.bit_planes`.
      row_bytes: bytes of a row of packed bits.
      version: compute capability to compile for.

    Returns:
      planes int32 `[k, m, b, n, c, 256]`, total int32 `[k, m, b, n, c]` and scale float32
      `[k, m, b]`, n groups of 16 planes and c blocks of 512 inputs. Element `128 s + 16 p + 4 t +
      2 w + h` of a block is word `4 t + 2 s + w` of plane `p + 8 h`. A total is the sum of the
      integers of a block, as a group of planes has them.
    """
    b, k, m, i = u.shape
    groups, blocks = limbs - 1, -(-row_bytes // PLANE_BYTES)
    outs = [jax.ShapeDtypeStruct((k, m, b, groups, blocks, 256), jnp.int32),
            jax.ShapeDtypeStruct((k, m, b, groups, blocks), jnp.int32),
            jax.ShapeDtypeStruct((k, m, b), jnp.float32)]
    planes, total, scale = call(
        lay_planes, [u], outs, (blocks, k * m, b), WARPS, 1, version, plane_constants(
            u.shape, limbs, row_bytes))
    return planes, total, scale


def plane_constants(shape: tuple[int, ...], limbs: int, row_bytes: int) -> dict[str, int]:
    """The constants of `lay_planes` for activations of a shape `[b, k, m, i]`."""
    return {"INPUTS": shape[3], "ROW_BYTES": row_bytes, "LIMBS": limbs, "CHUNK": chunk(shape[3])}


def limb_columns(
    u: jax.Array, limbs: int, row_bytes: int, block: int, columns: int, per_row: int, version: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u: [b, k, m, i]` float32 -> int8 limbs as columns of the tensor instruction.

    Args:
      u: the activations, scaled by each path.
      limbs: 2 or 3; the same integers as `activations.limbs`.
      row_bytes: bytes of a row of packed bits.
      block: bytes of a row that the product reads at a time.
      columns: columns of all rows, at least b per_row; those that no limb fills are 0.
      per_row: columns of each row of the batch, at least `limbs`.
      version: compute capability to compile for.

    Returns:
      q int8 `[k, m, columns, inputs of all blocks]`, the most significant limb of a row first;
      total int32 `[k, m, p, columns]`, the sums of q over p parts of the inputs; scale float32
      `[k, m, columns]`, what one unit of q stands for.
    """
    k, m = u.shape[1:3]
    constants, grid = limb_plan(u.shape, limbs, row_bytes, block, columns, per_row)
    outs = [jax.ShapeDtypeStruct((k, m, columns, inputs_of(row_bytes, block)), jnp.int8),
            jax.ShapeDtypeStruct((k, m, grid[0], columns), jnp.int32),
            jax.ShapeDtypeStruct((k, m, columns), jnp.float32)]
    q, total, scale = call(lay_limbs, [u], outs, grid, WARPS, 1, version, constants)
    return q, total, scale


def limb_plan(
    shape: tuple[int, ...], limbs: int, row_bytes: int, block: int, columns: int, per_row: int
) -> tuple[dict[str, int], tuple[int, int, int]]:
    """The constants of `lay_limbs` and its grid for activations of a shape `[b, k, m, i]`."""
    b, k, m, i = shape
    constants = {"INPUTS": i, "ROW_BYTES": row_bytes, "LIMBS": limbs, "BLOCK": block, "BATCH": b,
                 "COLUMNS": columns, "PER_ROW": per_row, "CHUNK": chunk(i), "LAID": LIMB_INPUTS}
    return constants, (limb_parts(row_bytes, block), k * m, columns // per_row)


def inputs_of(row_bytes: int, block: int) -> int:
    """Inputs that the blocks of a row meet, those that come twice included."""
    return -(-row_bytes // block) * block * 8


def limb_parts(row_bytes: int, block: int) -> int:
    """Parts of the inputs that `lay_limbs` lays one by one, each with its own totals."""
    return -(-inputs_of(row_bytes, block) // LIMB_INPUTS)


def chunk(inputs: int) -> int:
    """A power of two that holds all inputs, and `CHUNK` at most."""
    return min(CHUNK, 1 << (inputs - 1).bit_length())


@static
def _repeated(row_bytes, block):
    """Inputs at the front of the last block of a row that the block before it has read."""
    whole = row_bytes // block * block
    return 8 * (block - (row_bytes - whole)) if whole and row_bytes > whole else 0


@jit
def _input_at(place, ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr, INPUTS: tl.constexpr):
    """The input that the blocks of a row meet at `place`, and whether there is one.

    The last block ends where the row ends, and what the block before it has read is none there.
    """
    WHOLE: tl.constexpr = ROW_BYTES // BLOCK * BLOCK * 8
    REPEATED: tl.constexpr = _repeated(ROW_BYTES, BLOCK)
    last = place >= WHOLE
    at = tl.where(last, place - REPEATED, place)
    return at, (at < INPUTS) & ((place < WHOLE) | (at >= WHOLE))


@jit
def _row_scale(row, LARGEST: tl.constexpr, INPUTS: tl.constexpr, CHUNK: tl.constexpr):
    """What one unit of fixed point stands for in a row: its largest value / LARGEST."""
    # Sizes are ordered as the integers of their bits are, and those of a NaN are above all others,
    # so that a NaN is the largest.
    top = tl.zeros((CHUNK,), tl.int32)
    for start in tl.range(0, INPUTS, CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(row + at, mask=at < INPUTS, other=0)
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(top, 0).to(tl.float32, bitcast=True)
    # A row of zeros, or one so small that the scale would be subnormal, has any scale.
    return tl.where(largest < 1e-30, 1.0, tl.div_rn(largest, LARGEST * 1.0))


@jit
def _fixed(x, scale, LARGEST: tl.constexpr):
    """`round(x / scale)`, halves to even, as int32 of at most LARGEST."""
    exact = tl.div_rn(x, scale + tl.zeros_like(x))
    below = tl.floor(exact)
    rest = exact - below
    odd = below - 2 * tl.floor(below * 0.5)
    v = tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), below + 1, below)
    return tl.minimum(tl.maximum(v, -LARGEST * 1.0), LARGEST * 1.0).to(tl.int32)


@static
def _top_plane(limbs):
    """`2^(8 limbs - 1) - 1`, the largest value of two's complement."""
    return 2 ** (8 * limbs - 1) - 1


@static
def _top_limbs(limbs):
    """The largest value that balanced low limbs and a top limb of at most 127 can hold."""
    return 127 * 256 ** (limbs - 1) - 128


@jit
def _sum(v):
    """The sum of all elements, of three axes."""
    return tl.sum(tl.sum(tl.sum(v, 2), 1), 0)


@jit
def lay_planes(
    u, planes, total, scale,
    INPUTS: tl.constexpr, ROW_BYTES: tl.constexpr, LIMBS: tl.constexpr, CHUNK: tl.constexpr,
):
    """One block of 512 inputs of one row: see `plane_fragments`. Grid (blocks, k m, b)."""
    LARGEST: tl.constexpr = _top_plane(LIMBS)
    GROUPS: tl.constexpr = LIMBS - 1
    block, vector, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = vector * tl.num_programs(2) + batch
    row = u + (batch * tl.num_programs(1) + vector).to(tl.int64) * INPUTS
    unit = _row_scale(row, LARGEST, INPUTS, CHUNK)
    # Byte j of word w holds inputs 32 apart, bit p of it that at 32 p; four neighbours in a thread
    # leave few sums to be made across threads.
    word = tl.arange(0, 16)[:, None, None]
    bit = tl.arange(0, 8)[None, :, None]
    byte = tl.arange(0, 4)[None, None, :]
    place = block * 512 + word // 8 * 256 + bit * 32 + word % 8 * 4 + byte
    at, inside = _input_at(place, ROW_BYTES, 64, INPUTS)
    v = _fixed(tl.load(row + at, mask=inside, other=0), unit, LARGEST)
    words = tl.arange(0, 16)[:, None]
    plane = tl.arange(0, 16)[None, :]
    out = planes + (here * GROUPS * tl.num_programs(0) + block) * 256
    out += words // 2 % 2 * 128 + words // 4 * 4 + words % 2 * 2 + plane % 8 * 16 + plane // 8
    for group in tl.static_range(GROUPS):
        # Put together here and written at once: each write would wait for all threads.
        laid = tl.zeros((16, 16), tl.int32)
        for p in tl.static_range(min(16, 8 * LIMBS - 16 * group)):
            bits = ((v >> (16 * group + p)) & 1) << (8 * byte + bit)
            laid = tl.where(plane == p, tl.sum(tl.sum(bits, 2), 1)[:, None], laid)
        tl.store(out + group * tl.num_programs(0) * 256, laid)
    sums = total + here * GROUPS * tl.num_programs(0) + block
    tl.store(sums, _sum(v if GROUPS == 1 else v & 0xFFFF))
    if GROUPS == 2:
        tl.store(sums + tl.num_programs(0), _sum(v >> 16))
    if block == 0:
        tl.store(scale + here, unit)


@jit
def _limbs(v, LIMBS: tl.constexpr):
    """The int8 limbs of v, the most significant first; those below it lie in -128..127."""
    found = ()
    for _ in tl.static_range(LIMBS - 1):
        low = ((v + 128) & 255) - 128
        v = (v - low) >> 8
        found = (low,) + found
    return (v,) + found


@jit
def lay_limbs(
    u, q, total, scale,
    INPUTS: tl.constexpr, ROW_BYTES: tl.constexpr, LIMBS: tl.constexpr, BLOCK: tl.constexpr,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, PER_ROW: tl.constexpr, CHUNK: tl.constexpr,
    LAID: tl.constexpr,
):
    """LAID inputs of the columns of one row: see `limb_columns`. Grid (parts, k m, rows), where
    rows from BATCH on have columns of 0."""
    LARGEST: tl.constexpr = _top_limbs(LIMBS)
    ALL: tl.constexpr = (ROW_BYTES + BLOCK - 1) // BLOCK * BLOCK * 8
    vector, batch = tl.program_id(1), tl.program_id(2)
    # Rows from BATCH on read nothing.
    inputs = tl.where(batch < BATCH, INPUTS, 0)
    row = u + (tl.minimum(batch, BATCH - 1) * tl.num_programs(1) + vector).to(tl.int64) * INPUTS
    unit = _row_scale(row, LARGEST, INPUTS, CHUNK)
    place = tl.program_id(0) * LAID + tl.arange(0, LAID)
    at, inside = _input_at(place, ROW_BYTES, BLOCK, INPUTS)
    x = tl.load(row + at, mask=inside & (at < inputs), other=0)
    limbs = _limbs(_fixed(x, unit, LARGEST), LIMBS)
    column = batch * PER_ROW
    sums = total + (vector * tl.num_programs(0) + tl.program_id(0)) * COLUMNS + column
    values = q + (vector * COLUMNS + column).to(tl.int64) * ALL + place
    for n in tl.static_range(PER_ROW):
        limb = limbs[n] if n < LIMBS else place * 0
        tl.store(values + n * ALL, limb.to(tl.int8), mask=place < ALL)
        tl.store(sums + n, tl.sum(limb, 0))
        if tl.program_id(0) == 0:
            weight = unit * 256.0 ** (LIMBS - 1 - n) if n < LIMBS else unit * 0
            tl.store(scale + vector * COLUMNS + column + n, tl.where(batch < BATCH, weight, 0))
