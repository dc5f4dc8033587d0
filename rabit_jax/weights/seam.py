"""The seam between models and weights: `linear` multiplies, `lookup` reads rows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Weight


def linear(x: Array, w: Array | Weight) -> Array:
    """`x @ w` for an array or a weight node.

    Args:
      x: `[..., i]` float.
      w: array `[i, o]`, cast to `x.dtype`, or a weight node of that shape.

    Returns:
      `[..., o]` in `x.dtype`.
    """
    if is_weight(w):
        return w.matmul(x)
    return x @ jnp.asarray(w, x.dtype)


def lookup(table: Any, tokens: Array) -> Array:
    """`table[tokens]`; a token without a row reads NaN.

    Args:
      table: array `[v, d]`, or an embedding that is a weight node: a `Table`, or one that is laid.
      tokens: int `[...]`.

    Returns:
      `[..., d]` in the dtype of an array, else in float32.
    """
    return table.lookup(tokens) if hasattr(table, "lookup") else jnp.take(table, tokens, axis=0)


def times(x: Array, scale: Array) -> Array:
    """`x * scale` along the last axis: `[..., n]` by `[n]`."""
    return x * scale.reshape(*(1,) * (x.ndim - 1), -1)
