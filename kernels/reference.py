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
