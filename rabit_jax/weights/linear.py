"""The seam between models and weights: one function, and the protocol a weight fulfils."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Weight(Protocol):
    """A matrix `[..., i, o]` in some representation; a `flax.struct` dataclass whose leaves are
    arrays.

    Leading axes are stacked layers. `shape` is that of the dense matrix.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix that the node stands for."""

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat` for `x: [..., i]`, giving `[..., o]` in `x.dtype`; no leading weight axes."""

    def dense(self) -> jax.Array:
        """`W_hat: [..., i, o]` float32, exactly what the deployed model multiplies by."""

    def paths(self) -> Iterator[jax.Array]:
        """The terms `W_hat_1, ..., W_hat_k` of `W_hat`, each `[..., i, o]`, one at a time."""

    def roles(self) -> Any:
        """The same node with each leaf named for the optimiser and the mesh.

        "latent": a large trainable array; "scale": a small one, kept positive; "level": a small one
        of either sign; "sign" and "code": bits and integers, which no training changes.
        """

    def pack(self, name: str) -> Any:
        """The deployed form, itself a weight; `name` opens the message of what cannot be packed."""

    def bits_per_weight(self) -> float:
        """Bits per weight once packed, all scales, levels and tables counted, padding not."""

    def deployed_bytes(self) -> int:
        """Bytes of all arrays once packed, padding included; from the shapes alone."""

    def cost(self) -> Any:
        """Operations and bytes per token once packed, a `weights.cost.Cost`; from the shapes."""


def is_weight(x: Any) -> bool:
    """Whether `x` is a weight node: the test that stops tree functions from entering it."""
    return hasattr(type(x), "matmul") and hasattr(type(x), "dense")


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
