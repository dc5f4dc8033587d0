"""The packed products in plain JAX, which any device runs: path by path, or as one dense matrix.

`signs_matmul` and `packed_low_rank_matmul` define what every kernel must return. `unpacked_matmul`
is for many rows at once: it joins the paths to one dense matrix, which the device's own product
reads. Writing and reading that matrix is paid once per call; k products with sign matrices would
cost k times the multiplications.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.kernels.layout import as_rows, unpack_bits


def signs_matmul(
    u: jax.Array, bits: jax.Array, g: jax.Array, layer: jax.Array, rows: tuple[int, ...]
) -> jax.Array:
    """`y[b, o] = sum_k g[k, o] sum_i B[layer, k, o, i] u[b, k, m(o), i]`, see `matmul`.

    A scan over the paths, so that no more than one path's signs are ever unpacked. Products in
    `u.dtype`, sums in float32.
    """
    bits, g = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (bits, g))
    starts = [sum(rows[:m]) for m in range(len(rows))]

    def add_path(total, path):
        path_bits, path_g, path_u = path
        signs = unpack_bits(as_rows(path_bits), u.shape[-1]).astype(u.dtype) * 2 - 1
        parts = [
            jnp.einsum("bi,oi->bo", path_u[:, m], signs[start : start + n], precision="highest",
                       preferred_element_type=jnp.float32)
            for m, (start, n) in enumerate(zip(starts, rows, strict=True))
        ]
        y = jnp.concatenate(parts, axis=-1)
        return total + y * path_g.astype(jnp.float32)[None], None

    zero = jnp.zeros((u.shape[0], g.shape[-1]), jnp.float32)
    return jax.lax.scan(add_path, zero, (bits, g, jnp.swapaxes(u, 0, 1)))[0]


def packed_low_rank_matmul(
    x: jax.Array, u_bits: jax.Array, v_bits: jax.Array, h: jax.Array, l: jax.Array, g: jax.Array
) -> jax.Array:
    """`y = sum_c ((((x * h_c) U_c) * l_c) V_c) * g_c` from factors as they are stored.

    A scan over the copies, so that no more than one copy's signs are ever unpacked.

    Args:
      x: `[..., i]` float.
      u_bits: `[c, r, 32 ceil(i / 256)]` uint8 in the `rb256` layout, rows of `U^T`.
      v_bits: `[c, r, 32 ceil(o / 256)]` uint8 in the `rb256` layout, rows of `V`.
      h: `[c, i]` float.
      l: `[c, r]` float.
      g: `[c, o]` float.

    Returns:
      `[..., o]` in `x.dtype`; products in `x.dtype`, sums in float32.
    """
    lead = (1,) * (x.ndim - 1)

    def product(pattern, x_, scale, bits, width):
        signs = unpack_bits(bits, width).astype(x.dtype) * 2 - 1
        scaled = (x_ * scale.reshape(*lead, -1)).astype(x.dtype)
        return jnp.einsum(pattern, scaled, signs, precision="highest",
                          preferred_element_type=jnp.float32)

    def add_copy(total, copy):
        copy_u, copy_v, copy_h, copy_l, copy_g = copy
        inner = product("...i,ri->...r", x, copy_h, copy_u, x.shape[-1])
        y = product("...r,ro->...o", inner, copy_l, copy_v, copy_g.shape[-1])
        return total + y * copy_g.astype(jnp.float32).reshape(*lead, -1), None

    zero = jnp.zeros((*x.shape[:-1], g.shape[-1]), jnp.float32)
    return jax.lax.scan(add_copy, zero, (u_bits, v_bits, h, l, g))[0].astype(x.dtype)


def unpacked_matmul(
    x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array, layer: jax.Array,
    rows: tuple[int, ...],
) -> jax.Array:
    """`x: [b, i]`, `bits: [l, k, o, bytes]` or words, `g: [l, k, o]`, `h: [l, k, m, i]` ->
    float32 `[b, o]`; the matrix is rounded once to `x.dtype`."""
    bits, g, h = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (bits, g, h))
    tile = dense_tile(bits, g, h, rows, x.dtype)
    # Else some devices would round float32 to 10 bits of mantissa.
    return jnp.einsum("bi,oi->bo", x, tile, precision="highest",
                      preferred_element_type=jnp.float32)


def dense_tile(
    bits: jax.Array, g: jax.Array, h: jax.Array, rows: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`W_hat^T = sum_k diag(g_k) B_k diag(h_k)`, summed in float32 -> `[o, i]`."""
    ends = [sum(rows[: m + 1]) for m in range(len(rows))]

    def add_path(total, path):
        path_bits, path_g, path_h = path
        positive = unpack_bits(as_rows(path_bits), path_h.shape[-1])
        sizes = [g_m[:, None].astype(jnp.float32) * h_m[None].astype(jnp.float32)
                 for g_m, h_m in zip(jnp.split(path_g, ends[:-1]), path_h, strict=True)]
        size = jnp.concatenate(sizes)
        return total + jnp.where(positive == 1, size, -size), None

    zero = jnp.zeros((g.shape[-1], h.shape[-1]), jnp.float32)
    return jax.lax.scan(add_path, zero, (bits, g, h))[0].astype(dtype)
