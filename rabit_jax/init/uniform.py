"""`UniformResidualSpec`: how a full-precision kernel becomes a `UniformResidual`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.init.fit import SignFit, fit_layers
from rabit_jax.init.importance import Stats
from rabit_jax.init.svid import TINY, floored, rank1
from rabit_jax.weights.ste import F32, outer
from rabit_jax.weights.uniform import UniformResidual


@dataclass(frozen=True)
class UniformResidualSpec(SignFit):
    """One scale pair, fitted like those of `ResidualSignSpec`; the settings are those of `SignFit`.

    Starts from the first path of greedy SVID. Each round derives the signs by the coupled forward,
    `C = sum_i 2^(1-i) B_i`, and refits `W ~ C * (h g^T)` by weighted alternating least squares:

        h_i = sum_o W C g / sum_o C^2 g^2;   g_o = sum_i W C h / sum_i C^2 h^2

    Example:
      >>> node = UniformResidualSpec(k=2).init(w)      # w: [..., i, o]
    """

    type: Literal["uniform"] = field(default="uniform", kw_only=True)

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> UniformResidual:
        """Kernel `[..., i, o]` -> `UniformResidual`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.
        """
        g, h = fit_layers(_fit, self, w, stats)
        return UniformResidual(jnp.array(w, F32, copy=True), g, h, self.k, self.ste)

    def dense(self, node: UniformResidual) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def _fit(fit: UniformResidualSpec, w: jax.Array, d_in: jax.Array, d_out: jax.Array) -> tuple:
    """`g: [1, o]`, `h: [1, i]` of one matrix; the best round is kept."""
    p = w.astype(F32) * outer(d_in, d_out)
    magnitude = jnp.abs(p)

    def levels(g, h):
        """`C` of the current scales: `W_hat / (h g^T)`."""
        return UniformResidual(p, g[None], h[None], fit.k).dense() / outer(h, g)

    def error(g, h):
        return jnp.sum(jnp.square(p - levels(g, h) * outer(h, g)))

    def step(state):
        count, g, h, before, _, best = state
        c = levels(g, h)
        pc, cc = p * c, jnp.square(c)
        h = floored(pc @ g / jnp.maximum(cc @ jnp.square(g), TINY))
        g = floored(h @ pc / jnp.maximum(jnp.square(h) @ cc, TINY))
        now = error(g, h)
        best = jax.tree.map(lambda a, b: jnp.where(now < best[0], a, b), (now, g, h), best)
        return count + 1, g, h, now, before - now, best

    def gaining(state):
        count, _, _, now, gain, _ = state
        return (count < fit.rounds) & ((gain > fit.tolerance * now) | (fit.tolerance == 0))

    g, h = rank1(magnitude, jnp.mean(magnitude, axis=1), 1e-4)
    start = error(g, h)
    state = (jnp.int32(0), g, h, start, jnp.asarray(jnp.inf, F32), (start, g, h))
    *_, (_, g, h) = jax.lax.while_loop(gaining, step, state)
    return (g / d_out)[None], (h / d_in)[None]
