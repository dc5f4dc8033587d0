"""A sum of weights of one shape, each fitted to what those before it leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32, summed
from rabit_jax.tree import fold_key, pytree_dataclass
from rabit_jax.types import Array, Spec, Weight
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import WeightNode, part
from rabit_jax.weights.scaled_weight import rescaled


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
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> SumWeight:
        """Kernel `[..., i, o]` -> `SumWeight`; every part sees the same statistics."""
        terms, rest = [], w.astype(F32)
        for n, spec in enumerate(self.parts):
            own = None if key is None else fold_key(key, n)
            terms.append(spec.init(rest, stats, own))
            rest = rest - terms[-1].dense()
        return SumWeight(tuple(terms))

    def dense(self, node: SumWeight) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def residual(*specs: Spec) -> SumSpec:
    """Specs that each fit what those before them leave, see `SumSpec`.

    Example:
      >>> spec = residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1))
    """
    return SumSpec(specs)


@pytree_dataclass
class SumWeight(WeightNode):
    """`W_hat = W_hat_1 + ... + W_hat_n`: in training, packed, and in every count of bits.

    Attributes:
      terms: weight nodes of one shape `[..., i, o]`; all trained, or all packed.

    Example:
      >>> node = residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1)).init(w)
      >>> [type(term).__name__ for term in node.terms]
      ['LowRankSign', 'ResidualSign']
    """

    terms: tuple[Weight, ...] = part(many=True)

    header_type = "sum"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.terms[0].shape

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x W_hat_1 + ... + x W_hat_n`, each by its own product, added in `x.dtype`."""
        return summed(term.matmul(x) for term in self.terms)

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return summed(term.dense() for term in self.terms)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """The paths of the terms, one term after another, float32 `[..., i, o]`."""
        return chain.from_iterable(term.paths() for term in self.terms)

    def positive(self) -> Bool[Array, "... 1 1 n"]:
        """The signs of all terms that have them, flattened per layer: bool `[..., 1, 1, n]`."""
        lead = self.shape[:-2]
        found = [getattr(term, "positive", None) for term in self.terms]
        return jnp.concatenate([p().reshape(*lead, 1, 1, -1) for p in found if p], axis=-1)

    def pack(self, name: str) -> SumWeight:
        """The sum of the packed terms; what raises is theirs."""
        return SumWeight(tuple(t.pack(f"{name}, term {n}") for n, t in enumerate(self.terms)))

    def cost(self) -> Cost:
        """Cost per token of the terms; the few additions that join them are left out."""
        return Cost.sum(term.cost() for term in self.terms)

    def rescaled(self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]) -> SumWeight:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        return SumWeight(tuple(rescaled(term, d_in, d_out) for term in self.terms))
