"""A weight between two diagonals, and the spec that fits in the preconditioned space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats, check_exponents
from rabit_jax.signs.ste import F32, outer
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Spec, Weight
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import WeightNode, leaf, part
from rabit_jax.weights.low_rank_sign import LowRankSignSpec
from rabit_jax.weights.residual_sign import ResidualSignSpec
from rabit_jax.weights.seam import times
from rabit_jax.weights.sign_paths import SignFit, importances, round_scales


@dataclass(frozen=True)
class ScaledSpec:
    """Fit in the preconditioned space and map back: what `scaled(spec, a_in, a_out)` makes.

        node = spec.init(diag(d_in) W diag(d_out));  W_hat = diag(1 / d_in) node diag(1 / d_out)

    with `d = importance(s, a)`. The inner spec sees no statistics: the importance is in the matrix
    already. A node with scales along both sides takes the diagonals into them; the others (groups,
    codebooks) are wrapped, and the 16 (i + o) bits counted.

    Attributes:
      spec: what is fitted.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      shrinkage: how far the importances are drawn to their mean, 0 to 1.
    """

    spec: Spec = field(default_factory=ResidualSignSpec)
    a_in: float = 0.5
    a_out: float = 0.5
    shrinkage: float = 0.0
    type: Literal["scaled"] = field(default="scaled", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if not 0 <= self.shrinkage <= 1:
            raise BadInput(f"shrinkage is {self.shrinkage}: it must lie in 0..1")
        check_exponents(self.a_in, self.a_out)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> Weight:
        """Kernel `[..., i, o]` -> the inner spec's node between its diagonals.

        Without `stats` the importances are 1. Scales that take the diagonals are floored where they
        are stored, behind them: a spec of sign paths does that itself, and every part of a sum is
        scaled by itself.
        """
        own = {"a_in": self.a_in, "a_out": self.a_out, "shrinkage": self.shrinkage}
        if isinstance(self.spec, SignFit):
            return replace(self.spec, **own).init(w, stats, key)
        if isinstance(parts := getattr(self.spec, "parts", None), tuple):
            sum_of: Any = self.spec
            each = tuple(replace(self, spec=spec) for spec in parts)
            return replace(sum_of, parts=each).init(w, stats, key)
        d_in, d_out = importances(w.shape, stats, **own)
        p = w.astype(F32) * outer(d_in, d_out)
        if isinstance(self.spec, LowRankSignSpec):
            return self.spec.fit(p).rescaled(1 / d_in, 1 / d_out).floored()
        return rescaled(self.spec.init(p, None, key), 1 / d_in, 1 / d_out)

    def dense(self, node: Weight) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def scaled(spec: Spec, a_in: float = 0.5, a_out: float = 0.5) -> ScaledSpec:
    """`spec` fitted in the metric of the channel importances, see `ScaledSpec`.

    Example:
      >>> spec = scaled(LowRankSignSpec(bits=0.55), a_in=0.5, a_out=0.5)
      >>> student = convert(params, [(LLAMA_LINEARS, spec)], stats)
    """
    return ScaledSpec(spec, a_in, a_out)


@pytree_dataclass
class ScaledWeight(WeightNode):
    """`diag(d_in) W_hat diag(d_out)`: how a group quantiser is fitted in a preconditioned space.

    Attributes:
      inner: a weight node `[..., i, o]`, trained or packed.
      d_in: `[..., i]` positive; float32 in training, float16 packed.
      d_out: `[..., o]` positive, same dtype.
    """

    inner: Weight = part()
    d_in: Array = leaf("scale", "i")
    d_out: Array = leaf("scale", "o")

    header_type = "scaled"

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`((x * d_in) @ W_hat) * d_out` in `x.dtype`."""
        y = self.inner.matmul(times(x, self.d_in).astype(x.dtype))
        return times(y, self.d_out).astype(x.dtype)

    def dense(self) -> Float[Array, "... i o"]:
        """The scaled matrix, float32 `[..., i, o]`."""
        return self.inner.dense() * self._scale()

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """The scaled paths of the inner weight, float32 `[..., i, o]`."""
        return (path * self._scale() for path in self.inner.paths())

    def pack(self, name: str) -> ScaledWeight:
        """Pack the inner weight, and round the balanced diagonals to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        return ScaledWeight(
            self.inner.pack(name), *round_scales(name, d_in=self.d_in, d_out=self.d_out)
        )

    def cost(self) -> Cost:
        """Cost per token: the inner weight's, and `i + o` multiplications a layer."""
        *lead, i, o = self.shape
        own = prod(lead) * (i + o)
        return Cost.sum((self.inner.cost(), Cost(own, 0, 0, 2 * own)))

    def _scale(self) -> jax.Array:
        return outer(self.d_in.astype(F32), self.d_out.astype(F32))


def rescaled(
    node: Weight, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]
) -> Weight:
    """The weight of `diag(d_in) W_hat diag(d_out)`.

    A node with scales along both sides takes the diagonals in, at no cost; any other is wrapped in
    a `ScaledWeight`, which stores them.

    Args:
      node: a trainable weight node `[..., i, o]`.
      d_in: `[..., i]` positive float32.
      d_out: `[..., o]` positive float32.
    """
    if own := getattr(node, "rescaled", None):
        return own(d_in, d_out)
    return ScaledWeight(node, jnp.asarray(d_in, F32), jnp.asarray(d_out, F32))
