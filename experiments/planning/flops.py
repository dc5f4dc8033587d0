"""FLOPs of a program, counted in its jaxpr: products of matrices, with the turns of its loops.

The compiler's own count takes the body of a loop once, and a model is a loop over its layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

KINDS = ("model", "recomputed", "optimizer")
# What JAX and the training step call the scopes that are not the model's own work.
SCOPES = {"rematted_computation": "recomputed", "optimizer": "optimizer"}


@dataclass
class Flops:
    """FLOPs of a program by the dtype that is multiplied, such as `{"bfloat16": n}`.

    Attributes:
      model: forward and backward passes.
      recomputed: what the backward pass computes again of the forward pass.
      optimizer: what stands in the named scope `optimizer`.
    """

    model: Counter[str] = field(default_factory=Counter)
    recomputed: Counter[str] = field(default_factory=Counter)
    optimizer: Counter[str] = field(default_factory=Counter)

    def add(self, other: Flops, turns: int = 1) -> None:
        """Add another program that runs `turns` times."""
        for kind in KINDS:
            for dtype, n in getattr(other, kind).items():
                getattr(self, kind)[dtype] += n * turns

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, kind).total() for kind in KINDS)


def count_flops(function: Callable[..., object], *arguments: PyTree) -> Flops:
    """FLOPs of `function(*arguments)`, whose arguments may be shapes.

    A product `[m, k] [k, n]` counts `2 m n k`; everything else counts nothing. The body of a scan
    counts as often as it runs, that of a while loop once, and of branches the most costly one.
    """
    return flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def flops_of(jaxpr: core.Jaxpr, kind: str = "model") -> Flops:
    """FLOPs of a jaxpr, which count as `kind` where no scope in it says otherwise."""
    total = Flops()
    for equation in jaxpr.eqns:
        scope = str(equation.source_info.name_stack)
        own = next((found for name, found in SCOPES.items() if name in scope), kind)
        total.add(*_of_equation(equation, own))
    return total


def _of_equation(equation: Any, kind: str) -> tuple[Flops, int]:
    """FLOPs of what an equation does once, and how often it does it."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left = equation.invars[0].aval
        (contracted, _), _ = params["dimension_numbers"]
        terms = prod(left.shape[n] for n in contracted)
        found = Counter({str(left.dtype): 2 * prod(equation.outvars[0].aval.shape) * terms})
        return Flops(**{kind: found}), 1
    inner = [flops_of(one, kind) for one in _inner(params)]
    if name == "cond":
        return max(inner, key=lambda found: found.total), 1
    total = Flops()
    for one in inner:
        total.add(one)
    return total, params["length"] if name == "scan" else 1


def _inner(params: dict) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls. The rules of a custom derivative are functions, and are
    not among them: by then they have been applied."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
