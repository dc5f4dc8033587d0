"""The packed product in plain JAX: runs on any device and defines what every kernel must return."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .layout import unpack_bits


def packed_matmul(x: jax.Array, bits: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
    """`y = sum_i g_i * ((h_i * x) B_i)` from packed signs.

    A scan over the paths, so that no more than one path's signs are ever unpacked.

    Args:
      x: `[..., i]` float.
      bits: `[k, o, 32 ceil(i / 256)]` uint8 in the `rb256` layout.
      g: `[k, o]` float.
      h: `[k, i]` float.

    Returns:
      `[..., o]` in `x.dtype`; products in `x.dtype`, sums in float32.
    """
    lead = (1,) * (x.ndim - 1)

    def add_path(total, path):
        path_bits, path_g, path_h = path
        signs = unpack_bits(path_bits, x.shape[-1]).astype(x.dtype) * 2 - 1
        scaled = (x * path_h.reshape(*lead, -1)).astype(x.dtype)
        y = jnp.einsum("...i,oi->...o", scaled, signs, preferred_element_type=jnp.float32)
        return total + y * path_g.astype(jnp.float32).reshape(*lead, -1), None

    zero = jnp.zeros((*x.shape[:-1], g.shape[-1]), jnp.float32)
    return jax.lax.scan(add_path, zero, (bits, g, h))[0].astype(x.dtype)


def packed_low_rank_matmul(
    x: jax.Array, u_bits: jax.Array, v_bits: jax.Array, h: jax.Array, l: jax.Array, g: jax.Array
) -> jax.Array:
    """`y = sum_c ((((x * h_c) U_c) * l_c) V_c) * g_c` from packed signs of rank-r factors.

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
        return jnp.einsum(pattern, scaled, signs, preferred_element_type=jnp.float32)

    def add_copy(total, copy):
        copy_u, copy_v, copy_h, copy_l, copy_g = copy
        inner = product("...i,ri->...r", x, copy_h, copy_u, x.shape[-1])
        y = product("...r,ro->...o", inner, copy_l, copy_v, copy_g.shape[-1])
        return total + y * copy_g.astype(jnp.float32).reshape(*lead, -1), None

    zero = jnp.zeros((*x.shape[:-1], g.shape[-1]), jnp.float32)
    return jax.lax.scan(add_copy, zero, (u_bits, v_bits, h, l, g))[0].astype(x.dtype)
