"""What the two Pallas kernels share: how rows and columns are cut, and where they may run.

Bits reach a kernel as `[l k o, bytes]` uint8, a view of the stacked array and no copy of it. A
kernel masks no loads. Where a tile would pass the end of the rows or of a row it is moved back
until it fits; rows that belong to another tile are then not stored, and activations are laid so
that columns which another step has taken meet zeros.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import BLOCK_BYTES

# Programs that keep every multiprocessor of an H200 (132) or an RTX 4090 (128) busy with about 4.
PROGRAMS = 512
# Pallas computes offsets into arrays of up to 4 GiB in 32 bits, of which one is the sign.
_SIGNED, _WIDE = 2**31, 2**32


def check(u: jax.Array, rows: tuple[int, ...], batch: int, impl: str) -> None:
    """Raise BadInput unless `u: [b, k, m, i]` has 1..batch rows and m is `len(rows)`."""
    if u.ndim != 4 or not 1 <= u.shape[0] <= batch or u.shape[2] != len(rows):
        raise BadInput(f"{impl} got activations of shape {u.shape}, wanted [b, k, {len(rows)}, i] "
                       f"with b from 1 to {batch}: use impl 'pallas_int8' to 32 rows and "
                       "'unpacked' above")


def flat_rows(bits: jax.Array, layer: jax.Array | int, tile: int) -> tuple[jax.Array, jax.Array]:
    """uint8 `[l, k, o, n]` -> `[l k o, n]` of at least `tile` rows, and int32 `[1]`, the layer.

    A view, except for fewer than `tile` rows, which are padded with 0, and for stacks of 2 to
    4 GiB, of which the one layer is copied: there Pallas would compute negative offsets.
    """
    if _SIGNED < bits.size <= _WIDE:
        bits = jax.lax.dynamic_index_in_dim(bits, layer)
        layer = 0
    flat = bits.reshape(-1, bits.shape[-1])
    flat = jnp.pad(flat, ((0, max(tile - flat.shape[0], 0)), (0, 0)))
    return flat, jnp.reshape(jnp.asarray(layer, jnp.int32), 1)


def tiles(rows: tuple[int, ...], tile: int) -> int:
    """Tiles of `tile` rows when none holds rows of two members: `sum_m ceil(rows_m / tile)`."""
    return sum(-(-n // tile) for n in rows)


def place(
    index: jax.Array, rows: tuple[int, ...], tile: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First row, member and end row of the member of tile number `index`, int32 scalars.

    A chain of selections, because a table in memory would delay the first load of bits.
    """
    first, member, end = index * tile, jnp.int32(0), jnp.int32(rows[0])
    before, start = tiles(rows[:1], tile), rows[0]
    for m, n in enumerate(rows[1:], 1):
        inside = index >= before
        first = jnp.where(inside, start + (index - before) * tile, first)
        member = jnp.where(inside, jnp.int32(m), member)
        end = jnp.where(inside, jnp.int32(start + n), end)
        before, start = before + tiles((n,), tile), start + n
    return first, member, end


def cut(steps: int, programs: int, least: int, most: int) -> tuple[int, int]:
    """Parts of a row and steps of each: parts enough for `PROGRAMS` programs with `programs` each.

    No part has fewer than `least` steps where the row has as many, and none more than `most`.
    """
    parts = max(min(-(-PROGRAMS // programs), steps // least), -(-steps // most), 1)
    each = -(-steps // parts)
    return -(-steps // each), each


def column(step: jax.Array, last: int, held: int, width: int) -> jax.Array:
    """First byte of `step` in a row of `held` bytes; `last` is the greatest step it may be."""
    if (last + 1) * width <= held:
        return step * width
    # Multiplied last: so the compiler sees that it is a multiple of 32 and loads 16 bytes at once.
    end = max(held - width, 0) // BLOCK_BYTES
    return jnp.minimum(step * (width // BLOCK_BYTES), end) * BLOCK_BYTES


def arrange(x: jax.Array, width: int, steps: int) -> jax.Array:
    """`[..., n]` -> `[..., steps width]`: what step t meets at `column(t)` is at `t width`.

    Steps past the end are zeros, and so are the columns that the last one repeats.
    """
    n = x.shape[-1]
    whole = n // width * width
    tail = n - whole
    front = width - tail if tail and whole else 0
    lead = [(0, 0)] * (x.ndim - 1)
    rest = jnp.pad(x[..., whole:], [*lead, (front, 0)])
    joined = jnp.concatenate([x[..., :whole], rest], axis=-1)
    return jnp.pad(joined, [*lead, (0, steps * width - joined.shape[-1])])


def per_member(values: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """`[..., m]` -> `[..., o]`: the value of each row's member."""
    parts = [jnp.broadcast_to(values[..., m, None], (*values.shape[:-1], n))
             for m, n in enumerate(rows)]
    return jnp.concatenate(parts, axis=-1)


def flat_specs(inputs: int) -> dict[str, Any]:
    """Arguments of `pallas_call` that give a kernel whole arrays, where they lie."""
    return {"in_specs": [pl.no_block_spec] * inputs, "out_specs": pl.no_block_spec}


def on_gpu(x: jax.Array, impl: str) -> jax.Array:
    """`x`; compiling it for anything but an NVIDIA GPU raises BadInput.

    Where code will run is known when it is compiled, not when it is traced: programs for a GPU are
    compiled on hosts without one too.
    """
    return _on_gpu.bind(x, impl=impl)


def _refuse(ctx: mlir.LoweringRuleContext, x: object, *, impl: str) -> NoReturn:
    found = ", ".join(ctx.module_context.platforms)
    raise BadInput(f"{impl} runs on NVIDIA GPUs only and the device is of platform {found}: take "
                   "impl 'cpu', 'unpacked' or 'reference' there")

_on_gpu = Primitive("rabit_on_gpu")
_on_gpu.def_abstract_eval(lambda x, *, impl: x)
mlir.register_lowering(_on_gpu, _refuse)
mlir.register_lowering(_on_gpu, lambda ctx, x, *, impl: [x], platform="cuda")
