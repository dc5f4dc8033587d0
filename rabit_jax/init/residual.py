"""`ResidualSignSpec`: how a full-precision kernel becomes a `ResidualSign`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats, importance
from rabit_jax.init.svid import svid
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.residual import ResidualSign


@dataclass(frozen=True)
class ResidualSignSpec:
    """Function-preserving initialisation of RaBiT (arXiv 2602.05367, section 4).

    The latent is the kernel itself; the scales are fitted by iterative residual SVID to
    `diag(s_in^a_in) W diag(s_out^a_out)` and mapped back.

    Attributes:
      k: number of sign paths, 1 to 4; k = 1 is OneBit.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      shrinkage: how far the importances are drawn to their mean, 0 to 1.
      rounds: most refinement rounds; 0 is greedy SVID.
      tolerance: share of the error below which a round's gain ends the rounds.
      latent_dtype: "float32" or "bfloat16". Scales are float32 always.

    Example:
      >>> node = ResidualSignSpec(k=2).init(w)      # w: [..., i, o]
      >>> node.dense().shape == w.shape
      True
    """

    k: int = 2
    a_in: float = 0.5
    a_out: float = 0.5
    shrinkage: float = 0.0
    rounds: int = 80
    tolerance: float = 1e-3
    latent_dtype: str = "float32"

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        check_fit(self)
        if self.latent_dtype not in ("float32", "bfloat16"):
            raise BadInput(f"latent_dtype is {self.latent_dtype!r}: choose float32 or bfloat16")

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
        return ResidualSign(latent, *fit_scales(self, latent, stats))

    def dense(self, node: ResidualSign) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def check_fit(spec: Any) -> None:
    """Raise BadInput where a setting that `fit_scales` reads is out of its range."""
    if spec.k not in (1, 2, 3, 4):
        raise BadInput(f"k is {spec.k}: the number of sign paths must be 1, 2, 3 or 4")
    if spec.rounds < 0 or spec.tolerance < 0 or not 0 <= spec.shrinkage <= 1:
        raise BadInput(
            f"rounds {spec.rounds}, tolerance {spec.tolerance}, shrinkage {spec.shrinkage}: "
            "rounds and tolerance must not be negative, shrinkage must lie in 0..1"
        )


@partial(jax.jit, static_argnums=0)
def fit_scales(spec: Any, w: jax.Array, stats: Stats | None) -> tuple[jax.Array, jax.Array]:
    """Scales `g: [..., k, o]`, `h: [..., k, i]` float32 of the preconditioned iterative residual
    SVID.

    Layer by layer. `spec` has `k`, `a_in`, `a_out`, `shrinkage`, `rounds` and `tolerance`; `w` and
    `stats` are those of `ResidualSignSpec.init`.
    """

    def layer(w, d_in, d_out):
        fit = svid(w, spec.k, d_in, d_out, rounds=spec.rounds, tolerance=spec.tolerance)
        return fit.g, fit.h

    lead = w.shape[:-2]
    if stats is None:
        stats = Stats(jnp.ones((*lead, w.shape[-2])), jnp.ones((*lead, w.shape[-1])))
    d_in = importance(stats.s_in, spec.a_in, spec.shrinkage)
    d_out = importance(stats.s_out, spec.a_out, spec.shrinkage)
    return per_layer(layer, w, d_in, d_out)
