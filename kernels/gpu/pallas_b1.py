"""The packed product by the one-bit tensor instruction of NVIDIA GPUs, for batches of 1 to 3.

`mma.m16n8k256.b1 AND.POPC` multiplies 16 rows of 256 bits with 8 columns. Packed rows are its left
operand as they lie in memory, 16 bytes per load, and the 8 columns are bit planes of one row of
activations. Nothing is decoded.

Lane 4 g + t of a warp loads bytes 16 t .. 16 t + 15 of a 64-byte step of rows g and g + 8 and of
plane g, and gives the instruction its words in pairs: words 0 and 1 as the halves of the 256 bits,
then words 2 and 3. Which bits meet which does not matter, because planes are packed as rows are.
Of the counts it then holds rows g and g + 8 of planes 2 t and 2 t + 1.

That a lane holds these 16 bytes is the compiler's choice, and nothing guarantees it: `works` tests
it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS, Planes, bit_planes
from rabit_jax.kernels.gpu import pallas_tiles
from rabit_jax.kernels.gpu.device import passes

BATCH = 3

# Rows of one warp and of a program, bytes of a row in one step, planes of one instruction and of
# one sum.
WARPS, WARP_ROWS, STEP, COLUMNS, GROUP = 4, 16, 64, 8, 16
ROWS = WARPS * WARP_ROWS
LEAST_STEPS, MOST_STEPS = 4, 8
_MMA = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
_ASM = ("{ .reg .b32 y<4>; " + _MMA + "{y0,y1,y2,y3},{$4,$8,$5,$9},{$12,$13},{$16,$17,$18,$19};"
        + _MMA + "{$0,$1,$2,$3},{$6,$10,$7,$11},{$14,$15},{y0,y1,y2,y3}; }")
_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 16)


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, *, interpret: bool = False,
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]`.

    Arguments and result as in `matmul.signs_matmul`. Activations are `8 limbs` bit planes, and sums
    are exact integers until the scales come in.

    Args:
      u: float32 `[b, k, m, i]`, b from 1 to 3.
      bits: uint8 `[l, k, o, 32 ceil(i / 256)]` in the `rb256` layout.
      g: float `[l, k, o]`.
      layer: int32 scalar.
      rows: outputs of each member.
      limbs: 2 or 3.
      interpret: run the same indices with plain operations, which any device can.

    Returns:
      float32 `[b, o]`.

    Raises:
      BadInput: more than 3 rows or 32,768 inputs, or, on compiling, a device without CUDA.
    """
    pallas_tiles.check(u, rows, BATCH, "pallas_b1")
    if u.shape[-1] > PLANE_INPUTS:
        raise BadInput(f"pallas_b1 got {u.shape[-1]} inputs and sums {PLANE_INPUTS} exactly at "
                       "most: use impl 'pallas_int8'")
    return _product(u, bits, g, layer, rows=rows, limbs=limbs, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("rows", "limbs", "interpret"))
def _product(u, bits, g, layer, *, rows, limbs, interpret):
    if not interpret:
        u = pallas_tiles.on_gpu(u, "pallas_b1")
    k, o, held = bits.shape[1:]
    planes = bit_planes(u, 8 * limbs)
    programs = pallas_tiles.tiles(rows, ROWS)
    parts, each = pallas_tiles.cut(-(-held // STEP), programs * k, LEAST_STEPS, MOST_STEPS)
    flat, layer_at = pallas_tiles.flat_rows(bits, layer, ROWS)
    groups = -(-8 * limbs // GROUP)
    kernel = functools.partial(
        _kernel, rows=rows, paths=k, batch=u.shape[0], planes=8 * limbs, each=each, parts=parts,
        asm=not interpret)
    sums = pl.pallas_call(
        kernel, grid=(programs, parts, k), **pallas_tiles.flat_specs(3), name="rabit_b1",
        out_shape=jax.ShapeDtypeStruct((k * parts * u.shape[0] * groups * o,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1), interpret=interpret,
    )(layer_at, flat, _plane_rows(planes.words, parts * each))
    sums = jnp.sum(sums.reshape(k, parts, u.shape[0], groups, o), axis=1)
    one = lax.dynamic_index_in_dim(g, layer, keepdims=False).astype(jnp.float32)
    return _scaled(sums, planes, one, rows)


def _plane_rows(words: jax.Array, steps: int) -> jax.Array:
    """uint32 `[b, k, m, p, w]` -> uint8 `[k m b p, 64 steps]`, as the kernel's steps meet them."""
    held = lax.bitcast_convert_type(words, jnp.uint8)
    held = jnp.moveaxis(held.reshape(*words.shape[:-1], -1), 0, 2)
    return pallas_tiles.arrange(held, STEP, steps).reshape(-1, steps * STEP)


def _scaled(
    sums: jax.Array, planes: Planes, g: jax.Array, rows: tuple[int, ...]
) -> jax.Array:
    """`sum_k g scale sum_n 65536^n (2 sums - totals)`: int32 `[k, b, n, o]` -> float32 `[b, o]`."""
    y = jnp.zeros((sums.shape[1], sums.shape[3]), jnp.float32)
    scale = pallas_tiles.per_member(planes.scale, rows)
    for path in range(sums.shape[0]):
        value = jnp.zeros_like(y)
        for n in range(sums.shape[2]):
            total = pallas_tiles.per_member(planes.totals[:, path, :, n], rows)
            exact = 2 * sums[path, :, n] - total
            value = value + exact.astype(jnp.float32) * float(2 ** (GROUP * n))
        y = y + g[None, path] * scale[:, path] * value
    return y


def _kernel(
    layer_ref, bits_ref, planes_ref, out_ref, *, rows, paths, batch, planes, each, parts, asm
):
    """One tile of rows, part of their columns and path: `sum_i bit v` by group of 16 planes."""
    index, part, path = (pl.program_id(n) for n in range(3))
    o, shape = sum(rows), (WARPS, 8 * STEP)
    first, member, end = pallas_tiles.place(index, rows, ROWS)
    base = (layer_ref[0] * paths + path) * o
    start = jnp.minimum(base + first, bits_ref.shape[0] - ROWS)
    warp, byte = (lax.broadcasted_iota(jnp.int32, shape, d) for d in range(2))
    # Not // and %: their corrections of signs hide from the compiler that bytes are consecutive.
    lane_row, at = lax.div(byte, STEP), lax.rem(byte, STEP)
    bits_at = lax.rem(at, bits_ref.shape[1]) if bits_ref.shape[1] < STEP else at
    row = start + warp * WARP_ROWS + lane_row
    plane = (path * len(rows) + member) * batch * planes + lane_row
    sums = [[jnp.zeros(shape, jnp.int8) for _ in range(0, planes, COLUMNS)] for _ in range(batch)]
    loads = []
    for n in range(each):
        step = part * each + n
        c = bits_at + pallas_tiles.column(step, (parts - 1) * each + n, bits_ref.shape[1], STEP)
        loads.append((plgpu.load(bits_ref.at[row, c]), plgpu.load(bits_ref.at[row + 8, c])))
    if asm:
        # Else the assembler delays loads to save registers, and waits for memory once per step.
        plgpu.debug_barrier()
    for n, (upper, lower) in enumerate(loads):
        c = at + (part * each + n) * STEP
        for b, columns in enumerate(sums):
            for q in range(len(columns)):
                v = plgpu.load(planes_ref.at[plane + (b * planes + q * COLUMNS), c])
                columns[q] = _count(upper, lower, v, columns[q], asm)
    local = _row_of(start - base)
    mine = (local >= first) & (local < end)
    for b, columns in enumerate(sums):
        for n in range(0, planes, GROUP):
            value = _weighted(columns[n // COLUMNS : (n + GROUP) // COLUMNS], n + GROUP >= planes)
            at_out = ((path * parts + part) * batch + b) * -(-planes // GROUP) + n // GROUP
            plgpu.store(out_ref.at[at_out * o + local], value, mask=mine)


def _row_of(start: jax.Array) -> jax.Array:
    """Rows of the sums of `_weighted`, int32 `[warps, 8, 2]`."""
    warp, g, half = (lax.broadcasted_iota(jnp.int32, (WARPS, 8, 2), d) for d in range(3))
    return start + warp * WARP_ROWS + g + 8 * half


def _weighted(columns: list[jax.Array], signed: bool) -> jax.Array:
    """`sum_p 2^p count_p` over the lanes' counts, int8 `[warps, 512]` -> int32 `[warps, 8, 2]`.

    Byte 16 (4 g + t) + 4 r + n is byte n of the count of row `g + 8 (r // 2)` and of plane
    `2 t + r % 2`. The last plane counts negative where the sum is signed.
    """
    shape = columns[0].shape
    byte = lax.broadcasted_iota(jnp.int32, shape, 1)
    plane = lax.rem(lax.div(byte, 16), 4) * 2 + lax.rem(lax.div(byte, 4), 2)
    shift = lax.rem(byte, 4) * 8
    total = jnp.zeros(shape, jnp.int32)
    for q, counts in enumerate(columns):
        weight = lax.shift_left(jnp.ones(shape, jnp.int32), plane + COLUMNS * q)
        if signed and q == len(columns) - 1:
            weight = jnp.where(plane == COLUMNS - 1, -weight, weight)
        total = total + lax.shift_left(counts.astype(jnp.int32) & 255, shift) * weight
    by_lane = total.reshape(shape[0], 8, 4, 2, 2, 4)
    return jnp.sum(jnp.sum(jnp.sum(by_lane, axis=5), axis=4), axis=2)


def _count(upper, lower, v, counts, asm: bool) -> jax.Array:
    """Counts of one step added to `counts`; all bytes `[warps, 512]`, of which a lane has 16.

    Counts are int32, and bytes here because all operands of inline assembly have one shape.
    """
    if asm:
        [out] = plgpu.elementwise_inline_asm(
            _ASM, args=[upper, lower, v, counts], constraints=_CONSTRAINTS, pack=16,
            result_shape_dtypes=[jax.ShapeDtypeStruct(counts.shape, counts.dtype)])
        return out
    return _mma(_mma(counts, upper, lower, v, 0), upper, lower, v, 2)


def _mma(counts, upper, lower, v, first: int) -> jax.Array:
    """The instruction in plain operations, by its table of which lane holds what.

    With words `first` and `first + 1` of each lane 4 g + t as `a0, a2` (upper), `a1, a3` (lower)
    and `b0, b1` (v): row g of the left operand is a0 of the lanes g, then their a2, row g + 8 is
    a1, then a3, and column g of the right is b0, then b1. A lane's four sums are those of rows
    g, g, g + 8, g + 8 and columns 2 t, 2 t + 1, 2 t, 2 t + 1.
    """
    warps = counts.shape[0]
    row, row_8, column = (
        jnp.swapaxes(_words(a, 8, 4, 4)[..., first : first + 2], 2, 3).reshape(warps, 8, 8)
        for a in (upper, lower, v))
    left = jnp.concatenate([row, row_8], axis=1)
    both = lax.population_count(left[:, :, None] & column[:, None])
    d = jnp.sum(both, axis=-1).reshape(warps, 2, 8, 4, 2)
    lanes = jnp.transpose(d, (0, 2, 3, 1, 4)).reshape(warps, 128)
    return lax.bitcast_convert_type(_words(counts, 128) + lanes, jnp.int8).reshape(counts.shape)


def _words(block: jax.Array, *shape: int) -> jax.Array:
    """Bytes `[warps, 512]` -> int32 `[warps, *shape]`, four bytes to a word."""
    return lax.bitcast_convert_type(block.reshape(block.shape[0], *shape, 4), jnp.int32)


@functools.cache
def works() -> bool:
    """Whether the kernel gives the right sums on the first GPU; tested once per process.

    False, with a warning that says why, where it does not compile or where the compiler gives lanes
    other bytes than the instruction takes them for.
    """
    return passes(signs_matmul, "pallas_b1", "pallas_int8")
