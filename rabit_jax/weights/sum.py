"""`SumWeight`: several weights of one shape, added; each fitted to what those before it leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.cost import Cost
from rabit_jax.weights.scaled import rescaled


@struct.dataclass
class SumWeight:
    """`W_hat = W_hat_1 + ... + W_hat_n`: in training, packed, and in every count of bits.

    Attributes:
      terms: weight nodes of one shape `[..., i, o]`; all trained, or all packed.

    Example:
      >>> node = residual(LowRankSignSpec(bits=1.0), ResidualSignSpec(k=1)).init(w)
      >>> [type(term).__name__ for term in node.terms]
      ['LowRankSign', 'ResidualSign']
    """

    terms: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.terms[0].shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x W_hat_1 + ... + x W_hat_n`, each by its own product, added in `x.dtype`."""
        return sum(term.matmul(x) for term in self.terms)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return sum(term.dense() for term in self.terms)

    def paths(self) -> Iterator[jax.Array]:
        """The paths of the terms, one term after another, float32 `[..., i, o]`."""
        return chain.from_iterable(term.paths() for term in self.terms)

    def positive(self) -> jax.Array:
        """The signs of all terms that have them, flattened per layer: bool `[..., 1, 1, n]`."""
        lead = self.shape[:-2]
        found = [t.positive() for t in self.terms if hasattr(t, "positive")]
        return jnp.concatenate([p.reshape(*lead, 1, 1, -1) for p in found], axis=-1)

    def roles(self) -> SumWeight:
        """Leaf names for the optimiser and the mesh."""
        return SumWeight(tuple(term.roles() for term in self.terms))

    def pack(self, name: str) -> SumWeight:
        """The sum of the packed terms; what raises is theirs."""
        return SumWeight(tuple(t.pack(f"{name}, term {n}") for n, t in enumerate(self.terms)))

    def bits_per_weight(self) -> float:
        """Nominal bits per weight, summed over the terms."""
        return sum(term.bits_per_weight() for term in self.terms)

    def deployed_bytes(self) -> int:
        """Bytes once packed, summed over the terms."""
        return sum(term.deployed_bytes() for term in self.terms)

    def cost(self) -> Cost:
        """Cost per token of the terms; the few additions that join them are left out."""
        return Cost.sum(term.cost() for term in self.terms)

    def rescaled(self, d_in: jax.Array, d_out: jax.Array) -> SumWeight:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        return SumWeight(tuple(rescaled(term, d_in, d_out) for term in self.terms))

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "sum", "in", "out", "terms"}`."""
        i, o = self.shape[-2:]
        return {"type": "sum", "in": i, "out": o, "terms": [t.header() for t in self.terms]}

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> SumWeight:
        """The packed node of one matrix as shapes and dtypes, from its `header`."""
        from rabit_jax.weights.packed_types import abstract_packed

        return cls(tuple(abstract_packed(term) for term in header["terms"]))
