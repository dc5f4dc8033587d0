"""`FrozenPathSpec`: how a full-precision kernel becomes a `FrozenPath`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax

from rabit_jax.init.fit import SignFit
from rabit_jax.init.importance import Stats
from rabit_jax.init.independent import residuals
from rabit_jax.weights.frozen import FrozenPath


@dataclass(frozen=True)
class FrozenPathSpec(SignFit):
    """Path freezing (MBOK, arXiv 2505.22811), from the same start as `ResidualSignSpec`.

    Its authors start from greedy SVID: `rounds=0, a_in=0, a_out=0`. The settings are those of
    `SignFit`; the latent is what the fit leaves to the last path.

    Example:
      >>> node = FrozenPathSpec(k=2, rounds=0, a_in=0.0, a_out=0.0).init(w)      # w: [..., i, o]
    """

    type: Literal["frozen_path"] = field(default="frozen_path", kw_only=True)

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> FrozenPath:
        """Kernel `[..., i, o]` -> `FrozenPath`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.
        """
        g, h = self.scales(w, stats)
        found = residuals(w, g, h)
        return FrozenPath(found[..., :-1, :, :] >= 0, found[..., -1, :, :], g, h, self.ste)

    def dense(self, node: FrozenPath) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()
