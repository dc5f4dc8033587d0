"""The seam between models and weights: one function, `linear`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rabit_jax.tree import is_weight
from rabit_jax.types import Weight


def linear(x: jax.Array, w: jax.Array | Weight) -> jax.Array:
    """`x @ w` for an array or a weight node.

    Args:
      x: `[..., i]` float.
      w: array `[i, o]`, cast to `x.dtype`, or a weight node of that shape.

    Returns:
      `[..., o]` in `x.dtype`.
    """
    return w.matmul(x) if is_weight(w) else x @ jnp.asarray(w, x.dtype)


def times(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x * scale` along the last axis: `[..., n]` by `[n]`."""
    return x * scale.reshape(*(1,) * (x.ndim - 1), -1)
