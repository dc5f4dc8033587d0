"""What every weight of k sign paths shares, trained or packed: signs, sizes and costs."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp

from rabit_jax.weights.cost import Cost


class SignPaths:
    """Mixin of weights `sum_i diag(h_i) B_i diag(g_i)` with `g: [..., k, o]`, `h: [..., k, i]`.

    They all pack into the same form, so sizes and costs follow from the shape and k alone.
    """

    @property
    def k(self) -> int:
        """Number of sign paths."""
        return self.g.shape[-2]

    def signs(self) -> jax.Array:
        """Signs as int8 `[..., k, i, o]`, each -1 or +1."""
        return plus_minus(self.positive())

    def bits_per_weight(self) -> float:
        """Nominal bits per weight once packed, `k + 16 k (i + o) / (i o)`, padding left out."""
        i, o = self.shape[-2:]
        return self.k + 16 * self.k * (i + o) / (i * o)

    def deployed_bytes(self) -> int:
        """Bytes once packed, padding of the inputs to 256 included."""
        from rabit_jax.kernels.layout import packed_bytes

        *lead, i, o = self.shape
        return prod(lead) * self.k * (o * packed_bytes(i) + 2 * (i + o))

    def cost(self) -> Cost:
        """Cost per token: `k (i + o)` multiplications and `k i o` additions a layer.

        The additions within a path are `i - 1` for each output, and one more joins the paths.
        """
        *lead, i, o = self.shape
        paths = prod(lead) * self.k
        return Cost(paths * (i + o), paths * i * o, 0, self.deployed_bytes())


def plus_minus(positive: jax.Array) -> jax.Array:
    """Bool, True for +1 -> int8, each -1 or +1."""
    return positive.astype(jnp.int8) * 2 - 1
