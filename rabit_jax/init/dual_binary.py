"""`DualBinarySpec`: levels for `DualBinary` by a grid search per group."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats, importance
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.dual_binary import DualBinary, dual_binary
from rabit_jax.weights.groups import by_group, group_count, group_sum
from rabit_jax.weights.ste import F32

FRACTIONS = 40


@dataclass(frozen=True)
class DualBinarySpec:
    """Start of DB-LLM's flexible dual binarisation (arXiv 2402.11960): levels -s, 0, s, 2s.

    `a_1 = 2 s`, `a_2 = -s`; s is that of `f max|w|`, f = 1/40, 2/40, ..., 1, with the least error
    `sum_group d_in^2 (w - w_hat)^2`, `d_in = importance(s_in, a_in)`; every s belongs to one
    output, so the importance of outputs changes nothing. The latent is the kernel.

    Attributes:
      group: inputs that share levels.
      a_in: exponent of the input importance; 0 ignores it.

    Example:
      >>> node = DualBinarySpec(group=128).init(w)      # w: [..., i, o]
      >>> node.a.shape                                  # [..., 2, ceil(i / 128), o]
    """

    group: int = 128
    a_in: float = 0.5
    type: Literal["dual_binary"] = field(default="dual_binary", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if self.group < 1:
            raise BadInput(f"group is {self.group}: a group must hold at least 1 input")

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> DualBinary:
        """Kernel `[..., i, o]` -> `DualBinary`, searched layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None takes the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a float32 copy of `w`.
        """
        s = _search(self, w, None if stats is None else stats.s_in)
        return DualBinary(jnp.array(w, F32, copy=True), _levels(s), self.group)

    def dense(self, node: DualBinary) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def _levels(s: jax.Array) -> jax.Array:
    """`(2 s, -s)`: `[..., n, o]` -> `[..., 2, n, o]`."""
    return jnp.stack([2 * s, -s], axis=-3)


@partial(jax.jit, static_argnums=0)
def _search(spec: DualBinarySpec, w: jax.Array, s_in: jax.Array | None) -> jax.Array:
    """The best s of the grid, float32 `[..., n, o]`."""

    def layer(w, d_in):
        w, weight = w.astype(F32), jnp.square(d_in)[:, None]
        largest = by_group(jnp.abs(w), spec.group).max(axis=-2)

        def attempt(best, fraction):
            s = fraction * largest
            missed = jnp.square(w - dual_binary(w, _levels(s), spec.group))
            error = group_sum(weight * missed, spec.group)
            better = error < best[0]
            return (jnp.where(better, error, best[0]), jnp.where(better, s, best[1])), None

        shape = (group_count(w.shape[0], spec.group), w.shape[1])
        start = jnp.full(shape, jnp.inf, F32), jnp.zeros(shape, F32)
        fractions = jnp.arange(1, FRACTIONS + 1, dtype=F32) / FRACTIONS
        return jax.lax.scan(attempt, start, fractions)[0][1]

    d_in = jnp.ones(w.shape[:-1]) if s_in is None else importance(s_in, spec.a_in)
    return per_layer(layer, w, d_in)
