"""The seam between models and weights: `linear` multiplies, `lookup` reads rows."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from jaxtyping import Float, Int

from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Weight
from rabit_jax.weights.product import product


def linear(x: Float[Array, "... i"], w: Array | Weight) -> Float[Array, "... o"]:
    """`x @ w` for an array or a weight node.

    Args:
      x: `[..., i]` float.
      w: array `[i, o]`, cast to `x.dtype`, or a weight node of that shape.

    Returns:
      `[..., o]` in `x.dtype`.
    """
    if is_weight(w):
        return w.matmul(x)
    return product(x, w)


def lookup(table: Array | Weight, tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """`table[tokens]`; a token without a row reads NaN.

    Args:
      table: array `[v, d]`, or an embedding that is a weight node: a `Table`, or one that is laid.
      tokens: int `[...]`.

    Returns:
      `[..., d]` in the dtype of an array, else in float32.
    """
    rows = getattr(table, "lookup", None)
    return rows(tokens) if rows else jnp.take(cast(Array, table), tokens, axis=0)


def times(x: Float[Array, "... n"], scale: Float[Array, " n"]) -> Float[Array, "... n"]:
    """`x * scale` along the last axis: `[..., n]` by `[n]`."""
    return x * scale.reshape(*(1,) * (x.ndim - 1), -1)
