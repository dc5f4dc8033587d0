"""`IndependentSignSpec`: how a full-precision kernel becomes an `IndependentSign`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.init.fit import SignFit
from rabit_jax.init.importance import Stats
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.independent import IndependentSign
from rabit_jax.weights.ste import F32, coupled


@dataclass(frozen=True)
class IndependentSignSpec(SignFit):
    """Standard quantisation-aware training from the same start as `ResidualSignSpec`.

    The scales are those of the same fit, see `SignFit` for its settings. Latent i is what the
    coupled forward takes the sign of, `V_1 = W`, `V_i = W - W_hat_1 - ... - W_hat_{i-1}`. So at the
    start signs, scales and `W_hat` are those of the coupled form, and what differs afterwards is
    the coupling alone.

    Example:
      >>> node = IndependentSignSpec(k=2, ste="scaled").init(w)      # w: [..., i, o]
      >>> node.latents.shape                                         # [..., k, i, o]
    """

    type: Literal["independent"] = field(default="independent", kw_only=True)

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
        g, h = self.scales(w, stats)
        return IndependentSign(residuals(w, g, h), g, h, self.ste)

    def dense(self, node: IndependentSign) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@jax.jit
def residuals(w: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
    """What each path of the coupled forward takes the sign of: float32 `[..., k, i, o]`."""

    def layer(w, g, h):
        found = [w.astype(F32)]
        for _, term in coupled(w, g, h):
            found.append(found[-1] - term)
        return jnp.stack(found[:-1])

    return per_layer(layer, w, g, h)
