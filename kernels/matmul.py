"""The packed products and the choice of their implementation by device, batch and shape.

All but "unpacked" and "triton_dense", which multiply by one dense matrix, have the function

    signs_matmul(u, bits, g, layer, rows, limbs) -> y

    y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]

for `u: [b, k, m, i]` float32 activations, scaled by each path; `bits: [l, k, o, bytes]` uint8
(`rb256`) or `[l, k, w, o]` uint32 (`layout.to_words`); `g: [l, k, o]` float; `layer` an int32
scalar; `rows` how many of the o outputs belong to each of the m members, which are matrices that
were joined along their outputs; `limbs` 2 or 3, the bytes of fixed point per activation, 1 being
rounded before. The result is float32 `[b, o]`. The bits are indexed where they lie and no layer of
them is copied, except by the Pallas kernels from stacks of 2 to 4 GiB, whose offsets they cannot
hold.

"native", the C++ kernel of a CPU, scales the activations itself and reads bits in either form or as
`[l, t, k, w, 16]` uint32 (`layout.to_tiles`), the fastest; see `cpu.calls`.
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn, cast

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.kernels import reference
from rabit_jax.kernels.activations import PLANE_INPUTS, rounded_blocks
from rabit_jax.kernels.cpu.library import library
from rabit_jax.kernels.gpu.device import cuda_capability
from rabit_jax.kernels.layout import (
    TILE,
    as_rows,
    packed_bytes,
    stored_bytes,
    to_table_tiles,
    to_tiles,
    to_words,
)

# The module of each kernel below this folder; imported on use, because Triton and Pallas take
# a second to import. "reference" and "unpacked" are functions of `reference`.
MODULES = {
    "cpu": "cpu.bit_planes",
    "pallas_int8": "gpu.pallas_int8",
    "pallas_b1": "gpu.pallas_b1",
    "triton_int8": "gpu.triton_int8",
    "triton_b1": "gpu.triton_b1",
    "triton_dense": "gpu.triton_dense",
}
IMPLS = ("reference", "unpacked", "native", *MODULES)
# Rows up to which each kernel is chosen; above the last of a device the bits are unpacked. "native"
# has a form for every number of rows, see `cpu.calls.arithmetic`.
CPU_BATCH, B1_BATCH, INT8_BATCH = 8, 3, 32


def choose(
    platform: str, capability: int, batch: int, inputs: int, words: bool = False,
    b1_works: bool = True, triton_works: bool = True, native: bool = False,
) -> str:
    """The implementation for a batch of rows on a device.

    Args:
      platform: "cpu", "gpu" or whatever JAX calls it.
      capability: NVIDIA compute capability, such as 90; 0 on other devices.
      batch: rows of x, batch and time together.
      inputs: of the matrix.
      words: whether the bits lie as the CPU's words; turning them costs more than it saves.
      b1_works: whether the one-bit tensor instruction has passed its self-test on this device.
      triton_works: whether the other Triton kernels have.
      native: whether the native CPU kernel is there.

    Returns:
      a name of `IMPLS`.
    """
    if platform == "cpu" and native:
        return "native"
    if platform == "cpu":
        fits = words and batch <= CPU_BATCH and inputs <= PLANE_INPUTS
        return "cpu" if fits else "unpacked"
    if platform in ("gpu", "cuda") and capability >= 80:
        if not triton_works:
            return "unpacked"
        if batch <= B1_BATCH and inputs <= PLANE_INPUTS and b1_works:
            return "triton_b1"
        return "triton_int8" if batch <= INT8_BATCH else "triton_dense"
    return "reference"


def packed_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, *,
    layer: jax.Array | int | None = None, rows: tuple[int, ...] | None = None, limbs: int = 2,
    impl: str | None = None, short: bool = False,
) -> jax.Array:
    """`y = sum_k g_k * ((h_k * x) B_k)` from packed signs.

    Args:
      x: `[..., i]` float16, bfloat16 or float32.
      bits: `[k, o, bytes]` uint8 in the `rb256` layout, or as `laid_bits` lays them for a CPU,
        which multiplies them without turning them first: `[t, k, w, 16]` uint32 from
        `layout.to_tiles`, or `[k, w, o]` uint32 from `layout.to_words`.
      g: `[k, o]` float.
      h: `[k, i]` float; `[k, m, i]` for m matrices joined along o, each with its own scales.
      layer: where bits, g and h have a leading axis of layers, which one; an int32 scalar.
      rows: outputs of each of the m matrices; None means one matrix.
      limbs: bytes of fixed point per activation on integer kernels, 2 or 3; see `activations`. 1
        rounds `h x` of each path to one byte with a scale for each 256 inputs, by
        `activations.rounded_blocks`, in "native" where it multiplies as integers and in all that
        multiply path by path; one dense matrix, in which "native" too multiplies many rows,
        multiplies x as it is.
      impl: a name of `IMPLS`; None takes `choose`.
      short: whether the native kernel may round x and the matrix to bfloat16 where it multiplies
        many rows as floats; it does so for any bfloat16 x.

    Returns:
      `[..., o]` in `x.dtype`; sums are float32 or exact integers.

    Raises:
      BadInput: shapes that do not fit, an implementation that this device or batch does not have,
        or a derivative through the product.

    Example:
      >>> signs = jnp.ones((2, 8, 300), bool)
      >>> y = packed_matmul(jnp.ones(300), pack_bits(signs), jnp.ones((2, 8)), jnp.ones((2, 300)))
      >>> float(y[0])
      600.0
    """
    if layer is None:
        bits, g, h, layer = bits[None], g[None], h[None], 0
    if h.ndim == 3:
        h = h[:, :, None]
    rows = rows or (g.shape[-1],)
    _check(x, bits, g, h, rows, limbs, (1, 2, 3))
    x, g, h = map(_without_derivative, (x, g, h))
    flat = x.reshape(-1, x.shape[-1])
    # Weights that nobody laid for decoding are evaluated: as exactly as floats are, on a CPU.
    floats = impl is None and bits.dtype == jnp.uint8
    impl = impl or chosen(flat.shape[0], flat.shape[1], bits.dtype == jnp.uint32)
    layer = jnp.asarray(layer, jnp.int32)
    if impl == "native":
        short = short or x.dtype == jnp.bfloat16
        y = _native(flat, bits, g, h, layer, rows, limbs, short, floats)
    elif impl == "unpacked":
        bits, g, h, layer = _layer_of_tiles(bits, g, h, layer, rows, flat.shape[1])
        y = reference.unpacked_matmul(flat, bits, g, h, layer, rows)
    elif impl == "triton_dense":
        from rabit_jax.kernels.gpu.triton_dense import dense_matmul

        y = dense_matmul(flat, bits, g, h, layer, rows)
    else:
        bits, g, h, layer = _layer_of_tiles(bits, g, h, layer, rows, flat.shape[1])
        one = jax.lax.dynamic_index_in_dim(h, layer, keepdims=False)
        if limbs == 1:
            u = rounded_blocks(flat[:, None, None].astype(jnp.float32) * one[None])
            limbs = 2  # whose own error is 1 / 258 of what the rounding left
        else:
            u = _scaled(flat[:, None, None], one[None], impl)
        y = signs_matmul(u, bits, g, layer, rows, limbs, impl)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def packed_low_rank_matmul(
    x: jax.Array, u_bits: jax.Array, v_bits: jax.Array, h: jax.Array, l: jax.Array, g: jax.Array,
    *, layer: jax.Array | int | None = None, limbs: int = 2, impl: str | None = None,
) -> jax.Array:
    """`y = sum_c ((((x * h_c) U_c) * l_c) V_c) * g_c` from packed signs of rank-r factors.

    The copies c share the first product as joined matrices, and the second as paths.

    Args:
      x: `[..., i]` float.
      u_bits: `[1, c r, bytes of i]` uint8, rows of `U^T` of one copy after another; or their words.
      v_bits: `[c, o, bytes of r]` uint8, rows of `V^T`; or their words.
      h: `[c, i]` float.
      l: `[c, r]` float.
      g: `[c, o]` float.
      layer, limbs, impl: as for `packed_matmul`, `limbs` 2 or 3; with a layer all arrays have a
        leading axis of layers.

    Returns:
      `[..., o]` in `x.dtype`.

    Raises:
      BadInput: as `packed_matmul`.
    """
    if layer is None:
        u_bits, v_bits, h, l, g = (a[None] for a in (u_bits, v_bits, h, l, g))
        layer = 0
    copies, r = l.shape[1:]
    joined, rows = l.reshape(l.shape[0], 1, copies * r), (r,) * copies
    _check(x, u_bits, joined, h[:, None], rows, limbs)
    _check(l[:, 0], v_bits, g, l[:, :, None], g.shape[-1:], limbs)
    x, h, joined, g = map(_without_derivative, (x, h, joined, g))
    flat = x.reshape(-1, x.shape[-1])
    impl = impl or chosen(flat.shape[0], flat.shape[1], u_bits.dtype == jnp.uint32)
    # Each copy multiplies other activations, so one dense tile cannot hold both.
    impl = "reference" if impl in ("unpacked", "triton_dense") else impl
    layer = jnp.asarray(layer, jnp.int32)
    if impl == "native":
        inner = _native(flat, u_bits, joined, h[:, None], layer, rows, limbs, None)
        inner = inner.reshape(-1, copies, r)
        y = _native(inner, v_bits, g, None, layer, g.shape[-1:], limbs, None)
        return y.astype(x.dtype).reshape(*x.shape[:-1], -1)
    if u_bits.ndim == 5:
        first = layer
        u_bits, joined, h, layer = _layer_of_tiles(u_bits, joined, h, first, rows, flat.shape[1])
        v_bits, g, _, _ = _layer_of_tiles(v_bits, g, h, first, g.shape[-1:], r)
    one = jax.lax.dynamic_index_in_dim(h, layer, keepdims=False)
    u = _scaled(flat[:, None, None], one[None, None], impl)
    inner = signs_matmul(u, u_bits, joined, layer, rows, limbs, impl)
    inner = inner.reshape(-1, copies, 1, r).astype(u.dtype)
    y = signs_matmul(inner, v_bits, g, layer, (g.shape[-1],), limbs, impl)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def laid_bits(
    bits: jax.Array, rows: tuple[int, ...], inputs: int, platform: str
) -> jax.Array:
    """uint8 `[..., k, o, bytes]` as that platform multiplies them fastest.

    On a CPU tiles for the native kernel, or words for JAX where that kernel is not there; rows of
    bytes anywhere else. `rows` are the outputs of the matrices that are joined, `inputs` their
    inputs.
    """
    if platform != "cpu":
        return bits
    return to_words(bits) if library() is None else to_tiles(bits, rows, inputs)


def _native(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array | None, layer: jax.Array,
    rows: tuple[int, ...], limbs: int, short: bool | None, floats: bool = False,
) -> jax.Array:
    """The product by the native CPU kernel: arguments as those of its `signs_matmul`.

    `short`: whether many rows may be multiplied in bfloat16; None wants integers for any number,
    and `floats` for none.
    """
    from rabit_jax.kernels.cpu import calls

    if bits.dtype == jnp.uint32 and bits.ndim == 4:  # words, for the path without this kernel
        bits, g = (jax.lax.dynamic_index_in_dim(a, layer) for a in (bits, g))
        h = None if h is None else jax.lax.dynamic_index_in_dim(h, layer)
        bits, layer = as_rows(bits), jnp.int32(0)
    same = g.dtype in (jnp.float16, jnp.float32) and (h is None or h.dtype == g.dtype)
    if not same:
        g, h = g.astype(jnp.float32), None if h is None else h.astype(jnp.float32)
    if short is None:
        how = calls.INTEGERS
    elif floats:
        how = calls.BFLOAT16 if short else calls.FLOAT32
    else:
        how = calls.arithmetic(
            x.shape[0], x.shape[-1], g.shape[1], limbs, short, calls.isa_in_use())
    return calls.signs_matmul(x.astype(jnp.float32), bits, g, h, layer, rows, limbs, how)


def _layer_of_tiles(
    bits: jax.Array, g: jax.Array, h: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    inputs: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tiles of one layer as rows of bytes, and what belongs to it; other bits as they are."""
    if bits.ndim != 5:
        return bits, g, h, layer
    bits, g, h = (jax.lax.dynamic_index_in_dim(a, layer) for a in (bits, g, h))
    return as_rows(bits, rows, inputs), g, h, jnp.int32(0)


def table_matmul(x: jax.Array, table: jax.Array, scale: jax.Array, limbs: int = 2) -> jax.Array:
    """`y[..., o] = scale[o] sum_i table[o, i] x[..., i]` of 8-bit integers.

    Args:
      x: `[..., i]` float16, bfloat16 or float32.
      table: int8 `[o, i]`, or `[t, ceil(i / 4), 16, 4]` from `laid_table`.
      scale: `[o]` float16 or float32.
      limbs: bytes of fixed point per activation on the native CPU kernel, 1 to 3.

    Returns:
      float32 `[..., o]`.
    """
    x, scale = _without_derivative(x), _without_derivative(scale)
    if table.ndim == 2:
        y = jnp.einsum("...i,oi->...o", x, table.astype(x.dtype),
                       preferred_element_type=jnp.float32)
        return y * scale.astype(jnp.float32)
    from rabit_jax.kernels.cpu import calls

    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = calls.table_matmul(flat, table[None], scale[None, None], limbs)
    return y.reshape(*x.shape[:-1], -1)


def laid_table(table: jax.Array, platform: str) -> jax.Array:
    """int8 `[o, i]` as that platform multiplies it fastest: on a CPU tiles, where it has a kernel
    for them."""
    return to_table_tiles(table) if platform == "cpu" and library() is not None else table


def _scaled(x: jax.Array, h: jax.Array, impl: str) -> jax.Array:
    """`x * h`: in `x.dtype` where that multiplies, else in float32 to make fixed point of."""
    return (x * h).astype(x.dtype) if impl == "reference" else x.astype(jnp.float32) * h


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...],
    limbs: int, impl: str,
) -> jax.Array:
    """The product of the module's docstring by a named implementation; float32 `[b, o]`.

    `u` may be of any float dtype, in which "reference" multiplies.
    """
    if impl not in IMPLS:
        raise BadInput(f"impl is {impl!r}: choose {', '.join(IMPLS)}")
    if impl == "reference":
        return reference.signs_matmul(u, bits, g, layer, rows)
    module = import_module(f"rabit_jax.kernels.{MODULES[impl]}")
    if impl == "cpu" and bits.dtype == jnp.uint8:
        # Rows of bits have to be turned at every call: those of the one layer.
        bits, g = (jax.lax.dynamic_index_in_dim(a, layer) for a in (bits, g))
        bits, layer = to_words(bits), jnp.int32(0)
    elif impl != "cpu" and bits.dtype == jnp.uint32:
        raise BadInput(f"bits lie as the CPU's words, {impl} wants uint8 rows: lay them for a GPU")
    return module.signs_matmul(u.astype(jnp.float32), bits, g, layer, rows, limbs)


def chosen(batch: int, inputs: int, words: bool) -> str:
    """What `choose` gives for the first device.

    The first call on a CPU may compile the native kernel, that on a GPU runs the self-test of the
    kernel that it would choose.
    """
    platform = jax.devices()[0].platform
    where = platform, cuda_capability(), batch, inputs, words
    name = choose(*where, native=platform == "cpu" and library() is not None)
    if not name.startswith("triton"):
        return name
    from rabit_jax.kernels.gpu import triton_b1, triton_int8

    if name == "triton_b1" and triton_b1.works(where[1]):
        return name
    return choose(*where, b1_works=False, triton_works=triton_int8.works(where[1]))


def _check(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, rows: tuple[int, ...], limbs: int,
    allowed: tuple[int, ...] = (2, 3),
) -> None:
    """`bits [l, k, o, bytes]`, `[l, k, w, o]` or `[l, t, k, w, 16]`; `g`, `h [l, k, m, i]`."""
    i, (layers, k, o) = x.shape[-1], g.shape
    words, tiles = packed_bytes(i) // 4, sum(-(-n // TILE) for n in rows)
    held = (layers, k, o, 4 * words)
    if bits.dtype == jnp.uint32:
        held = ((layers, tiles, k, stored_bytes(i) // 4, TILE) if bits.ndim == 5
                else (layers, k, words, o))
    wanted = {"bits": held, "h": (layers, k, len(rows), i)}
    for name, array in (("bits", bits), ("h", h)):
        if array.shape != wanted[name]:
            raise BadInput(f"{name} has shape {array.shape}, wanted {wanted[name]} for x "
                           f"{x.shape} and g {g.shape}")
    if bits.dtype not in (jnp.uint8, jnp.uint32) or sum(rows) != o or limbs not in allowed:
        *most, last = allowed
        raise BadInput(f"bits are {bits.dtype}, rows {rows} of {o} outputs, limbs {limbs}: wanted "
                       f"uint8 or uint32, rows that add up, and {', '.join(map(str, most))} or "
                       f"{last} limbs")
    if x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        raise BadInput(f"x is {x.dtype}, wanted float16, bfloat16 or float32")


def _without_derivative(x: jax.Array) -> jax.Array:
    """`x`; a derivative through it raises BadInput."""
    return cast(jax.Array, _identity(x))


@jax.custom_jvp
def _identity(x: jax.Array) -> jax.Array:
    return x


@_identity.defjvp
def _refuse(primals: tuple, tangents: tuple) -> NoReturn:
    raise BadInput("packed signs cannot be differentiated: train a ResidualSign or another "
                   "trainable weight, and pack it afterwards")
