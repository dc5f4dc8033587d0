"""The packed product by the int8 tensor instructions of NVIDIA GPUs, for batches of 1 to 32.

A byte of packed signs holds bit p of inputs that lie 32 apart, so one mask of a tile of bytes gives
the tile's bits p as int8 values 0 or 2^p: an operand of the tensor instruction after one operation
per four weights. The other operand holds the limbs of every row of activations as columns. Bits 4
to 7 are shifted down first, once per byte, and so bits p and p + 4 share an accumulator that counts
in units of 2^p. All sums are exact integers until the scales come in.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rabit_jax.kernels.activations import RADIX, Limbs
from rabit_jax.kernels.activations import limbs as int8_limbs
from rabit_jax.kernels.gpu import pallas_tiles
from rabit_jax.kernels.layout import BLOCK_BYTES

BATCH = 32
# Columns of one launch: the four accumulators of 64 would not fit a thread's registers.
COLUMNS = 32
STAGES, LEAST_STEPS = 3, 2


class Tile(NamedTuple):
    """Rows and bytes of one tile of bits, and the warps that multiply it."""

    rows: int
    width: int
    warps: int

# Up to 16 columns, and 32. Two warps keep Hopper on the instruction of one warp, which costs less
# per tile than that of four; with 32 columns half the bytes keep it within the registers.
NARROW, WIDE = Tile(32, 128, 2), Tile(64, 64, 4)


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, *, interpret: bool = False,
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]`.

    Arguments and result as in `matmul.signs_matmul`.

    Args:
      u: float32 `[b, k, m, i]`, b from 1 to 32.
      bits: uint8 `[l, k, o, 32 ceil(i / 256)]` in the `rb256` layout.
      g: float `[l, k, o]`.
      layer: int32 scalar.
      rows: outputs of each member.
      limbs: 2 or 3.
      interpret: run the same indices with plain operations, which any device can.

    Returns:
      float32 `[b, o]`.

    Raises:
      BadInput: more than 32 rows, or, on compiling, a device without CUDA.
    """
    pallas_tiles.check(u, rows, BATCH, "pallas_int8")
    return _product(u, bits, g, layer, rows=rows, limbs=limbs, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("rows", "limbs", "interpret"))
def _product(u, bits, g, layer, *, rows, limbs, interpret):
    if not interpret:
        u = pallas_tiles.on_gpu(u, "pallas_int8")
    flat, layer_at = pallas_tiles.flat_rows(bits, layer, WIDE.rows)
    one = lax.dynamic_index_in_dim(g, layer, keepdims=False).astype(jnp.float32)
    launches = -(-u.shape[0] * limbs // COLUMNS)
    each = -(-u.shape[0] // launches)
    parts = []
    for b in range(0, u.shape[0], each):
        fixed = int8_limbs(u[b : b + each], limbs)
        sums = _sums(fixed.q, flat, layer_at, rows, interpret)
        parts.append(_scaled(sums, fixed, one, rows))
    return jnp.concatenate(parts)


def _sums(
    q: jax.Array, flat: jax.Array, layer_at: jax.Array, rows: tuple[int, ...], interpret: bool
) -> jax.Array:
    """`sum_i bit q`, exact: int8 `[b, k, m, n, i]` -> int32 `[k, o, n, b]`."""
    (batch, k, _, limbs, _), held, o = q.shape, flat.shape[1], sum(rows)
    used = limbs * batch
    columns = max(8, pl.next_power_of_2(used))
    tile = NARROW if columns < COLUMNS else WIDE
    width = min(tile.width, 2 ** ((held // BLOCK_BYTES).bit_length() - 1) * BLOCK_BYTES)
    programs = pallas_tiles.tiles(rows, tile.rows)
    steps = -(-held // width)
    parts, each = pallas_tiles.cut(steps, programs * k, LEAST_STEPS, steps)
    kernel = functools.partial(
        _kernel, rows=rows, paths=k, used=used, columns=columns, tile=tile._replace(width=width),
        programs=programs, parts=parts, each=each, steps=steps, asm=not interpret)
    sums = pl.pallas_call(
        kernel, grid=(programs * parts, k), **pallas_tiles.flat_specs(3), name="rabit_int8",
        out_shape=jax.ShapeDtypeStruct((k * parts * o * used,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=STAGES),
        interpret=interpret,
    )(layer_at, flat, _limb_rows(q, held, columns, width, steps))
    return jnp.sum(sums.reshape(k, parts, o, limbs, batch), axis=1)


def _limb_rows(q: jax.Array, held: int, columns: int, width: int, steps: int) -> jax.Array:
    """int8 `[b, k, m, n, i]` -> `[k m 8 c, width steps]`: what bit p of each byte of a row meets.

    Column `n B + b` of the c columns is limb n of row b of B; the others are 0.
    """
    batch, k, m, n, i = q.shape
    padded = jnp.pad(q, [(0, 0)] * 4 + [(0, 8 * held - i)])
    blocks = padded.reshape(batch, k, m, n, -1, 8, BLOCK_BYTES)
    by_bit = jnp.transpose(blocks, (1, 2, 5, 3, 0, 4, 6)).reshape(k * m * 8, n * batch, held)
    by_bit = jnp.pad(by_bit, ((0, 0), (0, columns - n * batch), (0, 0)))
    return pallas_tiles.arrange(by_bit, width, steps).reshape(-1, steps * width)


def _scaled(sums: jax.Array, fixed: Limbs, g: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """`sum_k g scale sum_n 256^(N - 1 - n) (2 sums - sum_i q)`: float32 `[b, o]`.

    Sums are int32 `[k, o, n, b]`. Each limb's difference is exact, so that it is small before it
    is rounded.
    """
    k, o, n, batch = sums.shape
    scale = pallas_tiles.per_member(fixed.scale, rows)
    y = jnp.zeros((batch, o), jnp.float32)
    for path in range(k):
        value = jnp.zeros_like(y)
        for l in range(n):
            total = pallas_tiles.per_member(fixed.totals[:, path, :, l], rows)
            exact = 2 * sums[path, :, l].T - total
            value = value * float(RADIX) + exact.astype(jnp.float32)
        y = y + g[None, path] * scale[:, path] * value
    return y


def _kernel(
    layer_ref, bits_ref, limbs_ref, out_ref, *, rows, paths, used, columns, tile, programs, parts,
    each, steps, asm
):
    """One tile of rows, part of their columns and path: `sum_i bit q` for every column."""
    index, path, o = lax.rem(pl.program_id(0), programs), pl.program_id(1), sum(rows)
    part = lax.div(pl.program_id(0), programs)
    first, member, end = pallas_tiles.place(index, rows, tile.rows)
    base = (layer_ref[0] * paths + path) * o
    start = jnp.minimum(base + first, bits_ref.shape[0] - tile.rows)
    limb = (path * len(rows) + member) * 8 * columns

    def add_step(n, sums):
        step = part * each + n
        at = pallas_tiles.column(step, steps - 1, bits_ref.shape[1], tile.width)
        low = bits_ref[pl.ds(start, tile.rows), pl.ds(at, tile.width)]
        high = _shifted(low, asm)
        sums = list(sums)
        for p in range(8):
            x = limbs_ref[pl.ds(limb + p * columns, columns), pl.ds(step * tile.width, tile.width)]
            bit = _masked(low if p < 4 else high, 1 << p % 4, asm)
            sums[p % 4] += lax.dot_general(
                bit, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return tuple(sums)

    zero = jnp.zeros((tile.rows, columns), jnp.int32)
    # The compiler does not know the bound, since it does not know the part: it would unroll the
    # loop, and 16 columns would no longer fit the registers.
    units = lax.fori_loop(0, jnp.minimum(each, steps - part * each), add_step, (zero,) * 4)
    total = units[0]
    for p in range(1, 4):
        total += lax.shift_right_arithmetic(units[p], jnp.full_like(zero, p))
    local = start - base + lax.broadcasted_iota(jnp.int32, (tile.rows, columns), 0)
    column = lax.broadcasted_iota(jnp.int32, (tile.rows, columns), 1)
    mine = (local >= first) & (local < end) & (column < used)
    at_out = ((path * parts + part) * o + local) * used + column
    plgpu.store(out_ref.at[at_out], total, mask=mine)


def _shifted(bits: jax.Array, asm: bool) -> jax.Array:
    """`bits >> 4` below the mask of `_masked`, four bytes at a time."""
    return _bytewise("shr.u32 $0, $1, 4;", bits) if asm else bits >> 4


def _masked(bits: jax.Array, mask: int, asm: bool) -> jax.Array:
    """int8 `bits & mask`; the compiler would take the four bytes of a register apart."""
    if asm:
        return _bytewise(f"and.b32 $0, $1, 0x{mask * 0x01010101:08x};", bits)
    return (bits & mask).astype(jnp.int8)


def _bytewise(asm: str, bits: jax.Array) -> jax.Array:
    [out] = plgpu.elementwise_inline_asm(
        asm, args=[bits], constraints="=r,r", pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(bits.shape, jnp.int8)])
    return out
