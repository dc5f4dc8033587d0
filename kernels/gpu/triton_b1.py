"""The packed product with the one-bit tensor instruction: packed signs against packed bit planes.

For batches of up to 3 rows. The weights are not decoded at all: their words and those of the
activations' bit planes go to the instruction as they were loaded.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false

from __future__ import annotations

import functools

import jax

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS
from rabit_jax.kernels.gpu.device import capability, passes
from rabit_jax.kernels.gpu.triton_activations import PLANE_BYTES, plane_fragments
from rabit_jax.kernels.gpu.triton_tiles import (
    Constants,
    block_start,
    count,
    jit,
    partial_sums,
    power,
    splits,
    static,
    sum_to,
    tile_of,
    tile_rows,
    tile_start,
    tl,
)

MAX_BATCH = 3
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
    planes, total, scale = plane_fragments(u, limbs, bits.shape[-1], version)
    constants, grid = plan(u.shape[0], bits.shape, rows, limbs)
    arrays = (layer.reshape(1), bits, planes, total, scale, g)
    return partial_sums(
        b1_partials, arrays, (grid[1], u.shape[0], g.shape[-1]), grid, WARPS,
        STAGES, version, constants)


def plan(
    batch: int, bits: tuple[int, ...], rows: tuple[int, ...], limbs: int
) -> tuple[Constants, tuple[int, int, int]]:
    """The kernel's constants and its grid for bits of shape `[l, k, o, bytes]`."""
    row_tiles = sum(-(-n // (8 * WARPS)) for n in rows)
    parts = splits(row_tiles * bits[1], -(-bits[3] // PLANE_BYTES))
    constants = {
        "ROWS": rows, "ROW_BYTES": bits[3], "PATHS": bits[1], "SPLITS": parts, "BATCH": batch,
        "GROUPS": limbs - 1, "WARPS": WARPS, "UNROLL": UNROLL, "ASM": True,
    }
    return constants, (row_tiles, bits[1] * parts, 1)


@static
def _b1_asm():
    """Two products of 16 planes, 8 rows and 256 inputs, one after the other.

    Operands: $0-3 sums, $4-7 words of a row, $8-11 and $12-15 words of planes for its first and
    second half, $16-19 the sums before. All come as a load of 128 bits leaves them.
    """
    product = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
    first = "{t0,t1,t2,t3},{$8,$9,$10,$11},{$4,$5},{$16,$17,$18,$19};"
    second = "{$0,$1,$2,$3},{$12,$13,$14,$15},{$6,$7},{t0,t1,t2,t3};"
    return "{ .reg .b32 t<4>; " + product + first + product + second + " }"


@static
def _b1_constraints():
    return ",".join(["=&r"] * 4 + ["r"] * 16)


@jit
def _popcount(v):
    v = v.to(tl.uint32)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    return ((((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@jit
def _b1_block(w, v0, v1, acc, WARPS: tl.constexpr, ASM: tl.constexpr):
    """Adds to `acc` the counts of 8 rows, 16 planes and 512 inputs.

    Of a warp's 128 elements, w[16 r + 4 t + 2 s + k] is word 4 t + 2 s + k of row r and
    v_s[16 p + 4 t + 2 k + h] that word of plane p + 8 h; acc[16 p + 4 t + 2 h + e] is row 2 t + e
    of plane p + 8 h. The assembly relies on lane l holding elements 4 l to 4 l + 3, as 128-bit
    loads of neighbouring elements have it.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            _b1_asm(), _b1_constraints(), [w, v0, v1, acc], dtype=tl.int32, is_pure=True, pack=4)
    else:
        v = tl.permute(tl.join(v0, v1).reshape(WARPS, 8, 4, 2, 2, 2), (0, 4, 1, 2, 5, 3))
        words = v.reshape(WARPS, 2, 8, 1, 16) & w.reshape(WARPS, 1, 1, 8, 16)
        counts = tl.sum(_popcount(words), 4).reshape(WARPS, 2, 8, 4, 2)
        return acc + tl.permute(counts, (0, 2, 3, 1, 4)).reshape(WARPS, 128)


@jit
def _b1_turn(w, x, acc, UNITS: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr,
             ASM: tl.constexpr):
    """Reads 512 inputs of 8 rows per warp and of UNITS times 16 planes."""
    words = tl.load(w)
    new = ()
    for n in tl.static_range(UNITS):
        v0 = tl.load(x + n * STRIDE)
        v1 = tl.load(x + n * STRIDE + 128)
        new = new + (_b1_block(words, v0, v1, acc[n], WARPS, ASM),)
    return new


@jit
def _b1_value(counts, SIGN: tl.constexpr, WARPS: tl.constexpr):
    """`sum_p 2^p count_p` of 16 planes, with `-2^p` for p = SIGN -> int32 [WARPS, 8]."""
    element = tl.arange(0, 128)
    plane = element // 16 + element // 2 % 2 * 8
    weight = tl.full((128,), 1, tl.int32) << plane
    weight = tl.where(plane == SIGN, -weight, weight)
    parts = tl.reshape(counts * weight[None, :], (WARPS, 8, 4, 2, 2))
    return tl.reshape(tl.sum(tl.sum(parts, 3), 1), (WARPS, 8))


@static
def _sign(n, groups):
    """Plane of group n that has a negative weight: of 16 planes the last, of 24 too; or none."""
    return (15 if groups == 1 else 7) if n == groups - 1 else -1


@jit
def b1_partials(
    layer, bits, planes, total, scale, g, y,
    ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, PATHS: tl.constexpr, SPLITS: tl.constexpr,
    BATCH: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
    ASM: tl.constexpr,
):
    """`y[z, b, o] = g[o] scale[b] (2 sum_p 2^p sum_i bit[o, i] plane[b, p, i] - total[b])`.

    One program makes 8 outputs per warp of one path from one part of the inputs; z counts parts of
    paths. Packed signs and packed planes go to the tensor core as they are.

    layer: int32 [1]; bits: uint8 [l, PATHS, o, ROW_BYTES]; planes: int32 [PATHS, m, BATCH, GROUPS,
    c, 256], c blocks of 512 inputs of 16 planes in the order of `_b1_block`; total: int32 [PATHS,
    m, BATCH, GROUPS, c]; scale: float32 [PATHS, m, BATCH]; g: float [l, PATHS, o]; y: float32
    [PATHS SPLITS, BATCH, o]. Sums of 16 planes are exact in int32.
    """
    MEMBERS: tl.constexpr = count(ROWS)
    OUTPUTS: tl.constexpr = sum_to(ROWS, MEMBERS)
    WORDS: tl.constexpr = ROW_BYTES // 4
    BLOCKS: tl.constexpr = (WORDS + 15) // 16
    UNITS: tl.constexpr = BATCH * GROUPS
    UNIT: tl.constexpr = BLOCKS * 256
    TILE: tl.constexpr = 8 * WARPS
    path = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    member, first, end = tile_of(tl.program_id(0), ROWS, TILE)
    matrix = tl.load(layer).to(tl.int64) * PATHS + path
    vector = path * MEMBERS + member
    element = tl.arange(0, 128)
    warp = tl.arange(0, WARPS)[:, None]
    begin = tile_start(first, OUTPUTS, TILE)
    rows = tile_rows(8 * warp + (element // 16)[None, :], OUTPUTS, TILE)
    w = (bits + (matrix * OUTPUTS + begin) * ROW_BYTES).to(tl.pointer_type(tl.int32))
    # In rows of 8 words the second 8 are the first again, and meet planes of 0.
    w += rows * WORDS + (element % min(WORDS, 16))[None, :]
    x = planes + vector * (UNITS * UNIT) + element[None, :] + 0 * warp
    zero = tl.zeros((WARPS, 128), tl.int32)
    acc = (zero,) * UNITS
    start = split * BLOCKS // SPLITS
    stop = (split + 1) * BLOCKS // SPLITS
    x += start * 256
    for n in tl.range(start, stop, loop_unroll_factor=UNROLL):
        acc = _b1_turn(w + block_start(n, WORDS, 16), x, acc, UNITS, UNIT, WARPS, ASM)
        x += 256
    rows = begin + tile_rows(8 * warp + tl.arange(0, 8)[None, :], OUTPUTS, TILE)
    inside = (rows >= first) & (rows < end)
    row_scale = tl.load(g + matrix * OUTPUTS + rows, mask=inside, other=0).to(tl.float32)
    block = tl.arange(0, power(BLOCKS))
    mine = (block >= start) & (block < stop)
    for b in tl.static_range(BATCH):
        part = tl.zeros((WARPS, 8), tl.float32)
        for n in tl.static_range(GROUPS):
            group = vector * UNITS + b * GROUPS + n
            all_inputs = tl.sum(tl.load(total + group * BLOCKS + block, mask=mine, other=0), 0)
            value = 2 * _b1_value(acc[b * GROUPS + n], _sign(n, GROUPS), WARPS) - all_inputs
            part += value.to(tl.float32) * 65536.0**n
        part *= tl.load(scale + vector * BATCH + b) * row_scale
        tl.store(y + (tl.program_id(1) * BATCH + b) * OUTPUTS + rows, part, mask=inside)
