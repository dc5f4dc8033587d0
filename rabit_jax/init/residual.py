"""`ResidualSignSpec`: how a full-precision kernel becomes a `ResidualSign`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.init.fit import SignFit, check_choice
from rabit_jax.init.importance import Stats
from rabit_jax.weights.residual import ResidualSign


@dataclass(frozen=True)
class ResidualSignSpec(SignFit):
    """Function-preserving initialisation of RaBiT (arXiv 2602.05367, section 4).

    The latent is the kernel itself; the scales are fitted by iterative residual SVID to
    `diag(s_in^a_in) W diag(s_out^a_out)` and mapped back. k = 1 is OneBit (arXiv 2402.11295).

    Attributes:
      latent_dtype: "float32" or "bfloat16". Scales are float32 always.
      The others are those of `SignFit`: k, a_in, a_out, shrinkage, rounds, tolerance, ste.

    Example:
      >>> node = ResidualSignSpec(k=2).init(w)      # w: [..., i, o]
      >>> node.dense().shape == w.shape
      True
    """

    latent_dtype: str = "float32"
    type: Literal["residual"] = field(default="residual", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        super().__post_init__()
        check_choice("latent_dtype", self.latent_dtype, ("float32", "bfloat16"))

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> ResidualSign:
        """Kernel `[..., i, o]` -> `ResidualSign`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`; sharded arrays stay where they live.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a copy of `w` in `latent_dtype`.
        """
        latent = jnp.array(w, self.latent_dtype, copy=True)
        return ResidualSign(latent, *self.scales(latent, stats), self.ste)

    def dense(self, node: ResidualSign) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()
