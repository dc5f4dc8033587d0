"""Every spec, and the two ways to compose them: `scaled` and `residual`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from rabit_jax.errors import BadInput
from rabit_jax.init.codebook import CodebookSpec
from rabit_jax.init.dual_binary import DualBinarySpec
from rabit_jax.init.fit import importances
from rabit_jax.init.frozen import FrozenPathSpec
from rabit_jax.init.group_uniform import GroupUniformSpec
from rabit_jax.init.importance import Stats
from rabit_jax.init.independent import IndependentSignSpec
from rabit_jax.init.low_rank import LowRankSignSpec
from rabit_jax.init.residual import ResidualSignSpec
from rabit_jax.init.uniform import UniformResidualSpec
from rabit_jax.weights.convert import fold_key
from rabit_jax.weights.scaled import rescaled
from rabit_jax.weights.ste import F32, outer
from rabit_jax.weights.sum import SumWeight


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

    def init(self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None) -> Any:
        """Kernel `[..., i, o]` -> the inner spec's node between its diagonals.

        Without `stats` the importances are 1.
        """
        d_in, d_out = importances(self, w.shape, stats)
        node = self.spec.init(w.astype(F32) * outer(d_in, d_out), None, key)
        return rescaled(node, 1 / d_in, 1 / d_out)

    def dense(self, node: Any) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@dataclass(frozen=True)
class SumSpec:
    """Each spec fitted to what those before it leave: what `residual(spec1, spec2, ...)` makes.

        node_n = spec_n.init(W - W_hat_1 - ... - W_hat_{n-1});  W_hat = sum_n W_hat_n

    Attributes:
      parts: specs, at least two.
    """

    parts: tuple[Spec, ...] = ()
    type: Literal["sum"] = field(default="sum", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for fewer than two parts."""
        if len(self.parts) < 2:
            raise BadInput(f"parts has {len(self.parts)} specs: a sum needs at least two")

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> SumWeight:
        """Kernel `[..., i, o]` -> `SumWeight`; every part sees the same statistics."""
        terms, rest = [], w.astype(F32)
        for n, part in enumerate(self.parts):
            own = None if key is None else fold_key(key, n)
            terms.append(part.init(rest, stats, own))
            rest = rest - terms[-1].dense()
        return SumWeight(tuple(terms))

    def dense(self, node: SumWeight) -> jax.Array:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def scaled(spec: Spec, a_in: float = 0.5, a_out: float = 0.5) -> ScaledSpec:
    """`spec` fitted in the metric of the channel importances, see `ScaledSpec`.

    Example:
      >>> spec = scaled(LowRankSignSpec(bits=0.55), a_in=0.5, a_out=0.5)
      >>> student = convert(params, [(LLAMA_LINEARS, spec)], stats)
    """
    return ScaledSpec(spec, a_in, a_out)


def residual(*specs: Spec) -> SumSpec:
    """Specs that each fit what those before them leave, see `SumSpec`.

    Example:
      >>> spec = residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1))
    """
    return SumSpec(specs)


# What stands under `init.spec` in a config; the field `type` tells which.
Spec = (
    ResidualSignSpec
    | IndependentSignSpec
    | FrozenPathSpec
    | UniformResidualSpec
    | LowRankSignSpec
    | GroupUniformSpec
    | DualBinarySpec
    | CodebookSpec
    | ScaledSpec
    | SumSpec
)
