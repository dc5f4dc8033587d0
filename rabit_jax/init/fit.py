"""What the specs of sign paths share: the settings and the call of the scales' fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats, importance
from rabit_jax.init.svid import svid
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.ste import STE, Ste


@dataclass(frozen=True)
class SignFit:
    """Settings of the preconditioned iterative residual SVID (arXiv 2602.05367, section 4).

    The scales are fitted to `diag(s_in^a_in) W diag(s_out^a_out)` and mapped back.

    Attributes:
      k: number of sign paths, 1 to 4.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      shrinkage: how far the importances are drawn to their mean, 0 to 1.
      rounds: most refinement rounds; 0 is greedy SVID.
      tolerance: share of the error below which a round's gain ends the rounds.
      ste: straight-through rule of the latents, see `weights.ste.path_slope`.
    """

    k: int = 2
    a_in: float = 0.5
    a_out: float = 0.5
    shrinkage: float = 0.0
    rounds: int = 80
    tolerance: float = 1e-3
    ste: Ste = "identity"

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if self.k not in (1, 2, 3, 4):
            raise BadInput(f"k is {self.k}: the number of sign paths must be 1, 2, 3 or 4")
        if self.rounds < 0 or self.tolerance < 0 or not 0 <= self.shrinkage <= 1:
            raise BadInput(
                f"rounds {self.rounds}, tolerance {self.tolerance}, shrinkage {self.shrinkage}: "
                "rounds and tolerance must not be negative, shrinkage must lie in 0..1"
            )
        check_choice("ste", self.ste, STE)

    def scales(self, w: jax.Array, stats: Stats | None) -> tuple[jax.Array, jax.Array]:
        """Scales `g: [..., k, o]`, `h: [..., k, i]` float32 of `w: [..., i, o]`, layer by layer."""
        return fit_layers(_svid, self, w, stats)


def check_choice(name: str, found: str, choices: tuple[str, ...]) -> None:
    """Raise BadInput where a setting is none of its choices."""
    if found not in choices:
        raise BadInput(f"{name} is {found!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def _svid(fit: SignFit, w: jax.Array, d_in: jax.Array, d_out: jax.Array) -> tuple:
    found = svid(w, fit.k, d_in, d_out, rounds=fit.rounds, tolerance=fit.tolerance)
    return found.g, found.h


@partial(jax.jit, static_argnums=(0, 1))
def fit_layers(method: Callable, fit: Any, w: jax.Array, stats: Stats | None) -> Any:
    """`method(fit, w, d_in, d_out)` of every matrix of a stack, one layer at a time.

    Args:
      method: of one matrix `[i, o]` and its importances `[i]`, `[o]`.
      fit: settings with `a_in`, `a_out` and `shrinkage`.
      w: `[..., i, o]` float.
      stats: calibration statistics `[..., i]`, `[..., o]`; None gives importances of 1.
    """
    d_in, d_out = importances(fit, w.shape, stats)
    return per_layer(partial(method, fit), w, d_in, d_out)


def importances(
    fit: Any, shape: tuple[int, ...], stats: Stats | None
) -> tuple[jax.Array, jax.Array]:
    """The diagonals `d_in: [..., i]`, `d_out: [..., o]` float32 of a spec's preconditioner."""
    *lead, i, o = shape
    if stats is None:
        stats = Stats(jnp.ones((*lead, i)), jnp.ones((*lead, o)))
    d_in = importance(stats.s_in, fit.a_in, fit.shrinkage)
    return d_in, importance(stats.s_out, fit.a_out, fit.shrinkage)
