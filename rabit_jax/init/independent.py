"""`IndependentSignSpec`: how a full-precision kernel becomes an `IndependentSign`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats
from rabit_jax.init.residual import check_fit, fit_scales
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.independent import STE, IndependentSign
from rabit_jax.weights.ste import F32, coupled


@dataclass(frozen=True)
class IndependentSignSpec:
    """Standard quantisation-aware training from the same start as `ResidualSignSpec`.

    The scales are those of the same fit. Latent i is what the coupled forward takes the sign of,
    `V_1 = W`, `V_i = W - W_hat_1 - ... - W_hat_{i-1}`. So at the start signs, scales and `W_hat`
    are those of the coupled form, and what differs afterwards is the coupling alone.

    Attributes:
      k: number of sign paths, 1 to 4.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      shrinkage: how far the importances are drawn to their mean, 0 to 1.
      rounds: most refinement rounds; 0 is greedy SVID.
      tolerance: share of the error below which a round's gain ends the rounds.
      ste: "identity" or "scaled", the straight-through rule of `independent_weight`.

    Example:
      >>> node = IndependentSignSpec(k=2, ste="scaled").init(w)      # w: [..., i, o]
      >>> node.latents.shape                                         # [..., k, i, o]
    """

    k: int = 2
    a_in: float = 0.5
    a_out: float = 0.5
    shrinkage: float = 0.0
    rounds: int = 80
    tolerance: float = 1e-3
    ste: str = "identity"

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        check_fit(self)
        if self.ste not in STE:
            raise BadInput(f"ste is {self.ste!r}: choose {' or '.join(STE)}")

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> IndependentSign:
        """Kernel `[..., i, o]` -> `IndependentSign`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`; sharded arrays stay where they live.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node with float32 latents.
        """
        g, h = fit_scales(self, w, stats)
        return IndependentSign(_residuals(w, g, h), g, h, self.ste)

    def dense(self, node: IndependentSign) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@jax.jit
def _residuals(w: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
    """What each path of the coupled forward takes the sign of: float32 `[..., k, i, o]`."""

    def layer(w, g, h):
        residuals = [w.astype(F32)]
        for _, term in coupled(w, g, h):
            residuals.append(residuals[-1] - term)
        return jnp.stack(residuals[:-1])

    return per_layer(layer, w, g, h)
