"""What one token costs in each linear, counted from the shapes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from jaxtyping import PyTree

from rabit_jax.tree import is_weight, leaves


class Cost(NamedTuple):
    """Operations and bytes of `y = x W_hat` for one token, all stacked layers together.

    Attributes:
      multiplications: of two numbers; a sign flip is none.
      additions: of two numbers, subtractions included.
      lookups: entries read from a table, such as the vectors of a codebook.
      bytes: of the deployed weight that are read.
    """

    multiplications: int
    additions: int
    lookups: int
    bytes: int

    @staticmethod
    def sum(costs: Iterable[Cost]) -> Cost:
        """Sum of costs, field by field."""
        return Cost(*(sum(field) for field in zip(Cost(0, 0, 0, 0), *costs, strict=True)))


def cost(params: PyTree) -> Cost:
    """Cost per token of all matrices of a params tree that are weight nodes.

    Args:
      params: tree with weight nodes; abstract shapes (`jax.eval_shape`) will do.

    Example:
      >>> cost(convert(params, [(LLAMA_LINEARS, ResidualSignSpec(k=2))])).lookups
      0
    """
    return Cost.sum(leaf.cost() for _, leaf in leaves(params) if is_weight(leaf))


def dense_cost(shape: tuple[int, ...]) -> Cost:
    """Cost of a 16-bit dense matrix `[..., i, o]`: `i o` multiplications and additions a layer."""
    size = prod(shape)
    return Cost(size, size, 0, 2 * size)
