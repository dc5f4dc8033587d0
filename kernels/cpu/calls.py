"""The calls of the native CPU kernel: sign products and products with int8 tables.

Axes: b batch, l layers, k paths, m members, n groups of inputs, i in, o out, t tiles of 16 outputs,
w words.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.kernels.activations import PLANE_INPUTS
from rabit_jax.kernels.cpu.library import ATTENTION, SIGNS, TABLE, Library, library
from rabit_jax.kernels.layout import TILE

INTEGERS, FLOAT32, BFLOAT16 = 0, 1, 2
Cached: TypeAlias = jax.Array | tuple[jax.Array, jax.Array]  # codes and their scales
# Rows up to which integers are taken where they cost no more; floats are the more exact ones.
INTEGER_ROWS = 64
GROUP_END_WORDS = 2


class Costs(NamedTuple):
    """Nanoseconds of one core for 1,000 weights: by `python -m experiments.bench kernels` on Zen 5.

    Attributes:
      integer: for each row, path and limb.
      float32, bfloat16: for each row.
      expand: for each path, to make W_hat of its signs.
    """

    integer: float
    float32: float
    bfloat16: float
    expand: float


WIDE = Costs(2.2, 8.7, 4.5, 26.0)
VNNI = Costs(4.6, 14.5, 14.5, 65.0)
NARROW = Costs(7.8, 14.5, 14.5, 65.0)
COSTS = {"avx512": WIDE, "avxvnni": VNNI, "neon": VNNI, "avx2": NARROW, "portable": NARROW}


def arithmetic(
    batch: int, inputs: int, k: int, limbs: int, short: bool, isa: str, group: int = 0
) -> int:
    """How the kernel multiplies fastest: `INTEGERS`, `FLOAT32` or `BFLOAT16`.

    Args:
      batch: rows of x.
      inputs: of the matrix.
      k: sign paths.
      limbs: bytes of fixed point; 1 takes half the time of 2.
      short: whether x is bfloat16, in which many rows are then multiplied too.
      isa: the instruction set, one of `COSTS`.
      group: words of a group of inputs that has its own scales; 0 where there is one group.
    """
    cost = COSTS[isa]
    # A sum of integers ends with each group, which takes as long as so many words.
    ends = 1 + GROUP_END_WORDS / group if group else 1
    floats = cost.expand * k + batch * (cost.bfloat16 if short else cost.float32)
    if inputs <= PLANE_INPUTS and batch <= INTEGER_ROWS:
        if cost.integer * ends * k * limbs * batch <= floats:
            return INTEGERS
    return BFLOAT16 if short else FLOAT32


def signs_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array | None, layer: jax.Array,
    rows: tuple[int, ...], limbs: int, how: int = INTEGERS, isa: str | None = None,
    group: int = 0,
) -> jax.Array:
    """`y[b, o] = sum_k sum_n g[k, n, o] sum_{i in n} B[layer, k, o, i] h[k, m(o), i] x[b, k, i]`.

    As integers: with `scale_k` and the integers `v_k` of `activations.bit_planes` of `x h_k`, in
    this order of float32 operations, `y += (g_kn scale_k) float(sum_{i in n} B v_k)`. With one limb
    there is a scale for each block c of 256 inputs, see `activations.rounded_blocks`, and, every
    product and sum rounded by itself, `y += g_k (sum_c scale_kc float(sum_{i in c} B v_k))`. As
    floats: W_hat in float32 or bfloat16, sums in float32, `limbs` without effect.

    Args:
      x: float32 `[b, i]`, or `[b, k, i]` where each path has its own; then only as integers.
      bits: uint8 `[l, k, o, bytes]`, or uint32 `[l, t, k, w, 16]` from `layout.to_tiles`.
      g: float16 or float32 `[l, k, o]`, or `[l, k, n, o]` where groups of inputs have their own.
      h: the same dtype `[l, k, m, i]`; None stands for ones, then only as integers.
      layer: int32 scalar.
      rows: outputs of each of the m members.
      limbs: bytes of fixed point, 1 to 3; 1 wants one group of inputs.
      how: `INTEGERS`, `FLOAT32` or `BFLOAT16`.
      isa: an instruction set of `library().isas`; None takes the one in use.
      group: words of each group, whose inputs lie as `layout.in_groups` says, in tiles only; 0
        stands for one group of all inputs.

    Returns:
      float32 `[b, o]`.
    """
    one = _library()
    if how == INTEGERS and x.shape[-1] > PLANE_INPUTS:
        raise BadInput(f"integers got {x.shape[-1]} inputs and sum {PLANE_INPUTS} exactly at most")
    g = g[:, :, None] if g.ndim == 3 else g
    if how == INTEGERS and limbs == 1 and g.shape[2] > 1:
        raise BadInput(f"limbs is 1 and g has {g.shape[2]} groups of inputs: wanted one group, or "
                       "2 or 3 limbs")
    h = jnp.zeros((*g.shape[:2], len(rows), 0), g.dtype) if h is None else h
    y = jax.ShapeDtypeStruct((x.shape[0], g.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(SIGNS + one.suffix, y, vmap_method="sequential")
    return call(x, bits, g, h, jnp.asarray(layer, jnp.int32), rows=np.asarray(rows, np.int64),
                limbs=np.int64(limbs), group=np.int64(group), arithmetic=np.int64(how),
                isa=_isa(one, isa))


def table_matmul(
    x: jax.Array, tiles: jax.Array, scale: jax.Array, limbs: int = 2, isa: str | None = None,
    group: int = 0, layer: jax.Array | int = 0,
) -> jax.Array:
    """`y[b, o] = sum_n (scale[n, o] scale_x[b]) sum_{i in n} W[layer, o, i] v[b, i]`, `v` the
    integers of x.

    Args:
      x: float32 `[b, i]`, made fixed point as by `activations.limbs`.
      tiles: int8 `[l, t, ceil(i / 4), 16, 4]` from `layout.to_table_tiles`.
      scale: float16 or float32 `[l, n, o]`.
      limbs: bytes of fixed point, 1 to 3.
      isa: as for `signs_matmul`.
      group: inputs of each group, a multiple of 4; 0 stands for one group of all.
      layer: int32 scalar.

    Returns:
      float32 `[b, o]`.
    """
    one = _library()
    y = jax.ShapeDtypeStruct((x.shape[0], scale.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(TABLE + one.suffix, y, vmap_method="sequential")
    return call(x, tiles, scale, jnp.asarray(layer, jnp.int32), limbs=np.int64(limbs),
                group=np.int64(group // 4), isa=_isa(one, isa))


def attention(
    q: jax.Array, k: Cached, v: Cached, layer: jax.Array, allowed: jax.Array, scale: float,
    cap: float | None = None, isa: str | None = None,
) -> jax.Array:
    """`softmax(cap(scale q k^T)) v` of one query for each head over the cache of one layer.

    Slots that no row may see are not read.

    Args:
      q: float32 `[b, n g, h]`, the g queries of a key head side by side; h a multiple of 16, g at
        most 32.
      k, v: float32 `[l, b, n, s, h]`; or codes and the bits of their float16 scales: int8
        `[l, b, n, s, h]` with uint16 `[l, b, n, s, 1]`, or uint8 `[l, b, n, s, h/2]` with uint16
        `[l, b, n, s, 2 m]`, see `rabit_jax.models.cache.Codes`.
      layer: int32 scalar.
      allowed: bool `[b or 1, s]`, which slots a row may see; one that may see none gets zeros.
      scale, cap: of the scores; see `soft_cap`.
      isa: as for `signs_matmul`.

    Returns:
      float32 `[b, n g, h]`. Rounded like any float32 sum: instruction sets differ in the last bits.
    """
    one = _library()
    y = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call(ATTENTION + one.suffix, y, vmap_method="sequential")
    if not isinstance(k, tuple):
        nothing = jnp.zeros((*k.shape[:4], 0), jnp.uint16)
        k, v = (k, nothing), (cast(jax.Array, v), nothing)
    return call(q, *k, *v, allowed, jnp.asarray(layer, jnp.int32), scale=np.float64(scale),
                cap=np.float64(cap or 0.0), isa=_isa(one, isa))


def attention_fits(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
    """Whether `attention` takes queries `[b, t, n g, h]` and keys `[l, b, n, s, h]`."""
    return q[1] == 1 and q[3] % 16 == 0 and q[2] <= 32 * k[2]



def isa_in_use() -> str:
    """The instruction set that a call takes which names none."""
    found = _library()
    return found.isas[found.isa]


def _library() -> Library:
    found = library()
    if found is None:
        raise BadInput("there is no native CPU kernel here: choose impl=None, which takes what the "
                       "machine can do")
    return found


def _isa(found: Library, name: str | None) -> np.int64:
    return np.int64(found.isa if name is None else found.isas.index(name))


assert TILE == 16  # kTile of native/isa.h
