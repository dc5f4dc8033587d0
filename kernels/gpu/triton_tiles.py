"""What the Triton kernels share: how rows and inputs are cut, and how JAX calls a kernel.

The kernels split the inputs over programs, so that even a small matrix is spread over the whole
device. A program writes its own partial sums, which are added in a fixed order: no atomics, and the
same result every time. A matrix is read where it lies in a stack of layers and paths.

The loops have no masks. A tile that would reach over the end of the array is read from earlier
rows on; a block that would reach over the end of its row is read from earlier bytes on, and
`triton_activations` lays zeros where bytes come for the second time.

This is the one module that knows which versions of Triton and jax-triton there are.
"""

# Pyright reads a kernel as Python, but Triton compiles it: its loops unroll over `tl.static_range`,
# and its constants are plain numbers where they are given and `tl.constexpr` where they are used.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportArgumentType=false
# Here `tl` is None beside, where Triton is not installed and no kernel can run.
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

try:
    import triton.language as tl
    from triton import constexpr_function as static
    from triton import jit
except ModuleNotFoundError:  # Modules with kernels import without Triton; calling them needs it.
    tl = None

    def _as_it_is(kernel: Callable) -> Callable:
        return kernel

    jit = static = _as_it_is

# Arguments of a kernel that are known when it is compiled.
Constants: TypeAlias = dict[str, int | bool | tuple[int, ...]]
# Programs per matrix that keep the largest devices busy: 8 on each of about 132 processors.
PROGRAMS = 1056
# Partial sums up to which each is added on its own, which compilers do within what reads the sum.
FEW = 16


def splits(programs: int, blocks: int) -> int:
    """Parts of the inputs, such that the device is full and no part is empty."""
    return max(1, min(blocks, PROGRAMS // programs))


def partial_sums(
    kernel: Callable, arrays: Sequence[jax.Array], shape: tuple[int, ...],
    grid: tuple[int, int, int], warps: int, stages: int, version: int, constants: Constants,
) -> jax.Array:
    """`sum_z y[z]` of what a kernel writes, `y: [z, ...]` float32 of a shape, in a fixed order."""
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    [y] = call(kernel, arrays, [out], grid, warps, stages, version, constants)
    if shape[0] > FEW:
        return jnp.sum(y, axis=0)
    return functools.reduce(jnp.add, [y[z] for z in range(shape[0])])


def call(
    kernel: Callable, arrays: Sequence[jax.Array], outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int], warps: int, stages: int, version: int, constants: Constants,
) -> list[jax.Array]:
    """What a kernel writes: one array for each of `outs`, which follow `arrays` as its arguments.

    Args:
      kernel: the Triton function.
      arrays: its inputs, in the order of its arguments.
      outs: shapes and dtypes of its results.
      grid, warps, stages: how it is launched.
      version: compute capability to compile for, whatever this device is.
      constants: its `tl.constexpr` arguments by name.
    """
    from jax_triton import triton_call

    _repair_dce_rule()
    # jax-triton 0.4 has another name for the outputs, and takes Triton's options in a dictionary.
    if "out_type" in inspect.signature(triton_call).parameters:
        versioned = {"out_type": list(outs), "backend_options": {"enable_fp_fusion": True}}
    else:
        versioned = {"out_shape": list(outs), "enable_fp_fusion": True}
    return list(triton_call(
        *arrays, kernel=kernel, grid=grid, num_warps=warps, num_stages=stages,
        compute_capability=version, name=kernel.__name__, **versioned, **constants))


@functools.cache
def _repair_dce_rule() -> None:
    """Lets jax.jit remove dead code around a Triton kernel with jax-triton 0.4 under jax 0.12.

    The rule that jax-triton registers takes two arguments, jax 0.12 calls it with a third between.
    """
    from jax.interpreters import partial_eval
    from jax_triton.triton_lib import triton_kernel_call_p

    rule = getattr(partial_eval, "dce_rules", {}).get(triton_kernel_call_p)
    if rule is not None and len(inspect.signature(rule).parameters) == 2:
        partial_eval.dce_rules[triton_kernel_call_p] = lambda used, *rest: rule(used, rest[-1])


@static
def sum_to(rows, m):
    """`sum_{n < m} rows[n]`, known at compile time."""
    return sum(rows[:m])


@static
def tiles_to(rows, m, tile):
    """`sum_{n < m} ceil(rows[n] / tile)`, known at compile time."""
    return sum(-(-n // tile) for n in rows[:m])


@static
def power(n):
    """The least power of two that is not below n, known at compile time."""
    return 1 << (n - 1).bit_length()


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
