"""`GroupUniformSpec`: 2-bit round-to-nearest, as it is or as the start of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats
from rabit_jax.init.svid import SMALLEST
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.group_uniform import GroupUniform
from rabit_jax.weights.groups import by_group
from rabit_jax.weights.ste import F32


@dataclass(frozen=True)
class GroupUniformSpec:
    """Asymmetric round-to-nearest: at the start `W_hat` is `init.rounding.round_to_nearest` of W.

        s = (max - min) / (2^bits - 1),   c = -s round(-min / s)

    over a group, the range widened to hold 0. The step is floored at 1e-4, which 16 bits can hold;
    only groups narrower than three of these are rounded more coarsely for it.

    Attributes:
      bits: bits of a code, 1 to 8.
      group: inputs that share a step and a lowest level.

    Example:
      >>> node = GroupUniformSpec(bits=2, group=128).init(w)      # w: [..., i, o]
      >>> node.dense().shape == w.shape
      True
    """

    bits: int = 2
    group: int = 128
    type: Literal["round_to_nearest"] = field(default="round_to_nearest", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if not 1 <= self.bits <= 8 or self.group < 1:
            raise BadInput(
                f"bits {self.bits}, group {self.group}: bits must lie in 1..8 and a group must "
                "hold at least 1 input"
            )

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> GroupUniform:
        """Kernel `[..., i, o]` -> `GroupUniform`, layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: unused, the levels come from the range of the weights alone.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a float32 copy of `w`.
        """
        s, c = _fit_levels(self, w)
        return GroupUniform(jnp.array(w, F32, copy=True), s, c, self.group, self.bits)

    def dense(self, node: GroupUniform) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@partial(jax.jit, static_argnums=0)
def _fit_levels(spec: GroupUniformSpec, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and lowest level, each float32 `[..., n, o]`."""

    def layer(w):
        groups = by_group(w.astype(F32), spec.group)
        low = jnp.minimum(groups.min(axis=-2), 0)
        high = jnp.maximum(groups.max(axis=-2), 0)
        s = jnp.maximum((high - low) / (2**spec.bits - 1), SMALLEST)
        return s, -s * jnp.round(-low / s)

    return per_layer(layer, w)
