"""One implementation under measurement: activations, program, rotating weights, times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rabit_jax.kernels.bench.machine import device_seconds

SAMPLE_ROWS, SAMPLE_OUTPUTS = 8, 64
OUTLIER = 60.0


@dataclass(eq=False)
class Case:
    """One implementation at one shape and batch.

    Attributes:
      impl, k: as in its row.
      product: `(x [b, i], weight, layer) -> [b, o]`, to be compiled.
      exact: `(weight, x64 [b, i], outputs [s]) -> [b, s]` in float64.
      weight: the first of the rotation.
      xs: `[b, i]` activations, one for each product of a call.
      traced: whether the seconds are those that the device's kernels take, as its profiler has
        them, and not those until the host has the result.
      stacked: whether the rotation is one stack of layers, indexed where it lies as the decode
        engine does it; then `weight` has a leading axis of one. Else it is separate weights.
      rotation: the leaves of the stack or of each weight; filled by `rotate`.
      copies: weights in the rotation.
      turn: index of the next weight.
      seconds: of one product, one entry per repetition.
    """

    impl: str
    k: int | None
    product: Callable
    exact: Callable
    weight: PyTree[jax.Array]
    xs: tuple[jax.Array, ...]
    stacked: bool
    traced: bool = False
    rotation: list[list[jax.Array]] = field(default_factory=list)
    copies: int = 1
    turn: int = 0
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        product, (leaves, tree) = self.product, jax.tree.flatten(self.weight)
        stacked = self.stacked

        # Leaves, or calling would take the weights apart while the clock runs, and as few arguments
        # as can be: each costs a call a microsecond. Each product has activations of its own, or
        # XLA would join those of one input.
        def program(xs, weights, layers):
            weights = weights * len(xs) if stacked else weights
            return [product(x, jax.tree.unflatten(tree, w), layer)
                    for x, w, layer in zip(xs, weights, layers, strict=True)]

        self.program, self.rotation = jax.jit(program), [leaves]

    @property
    def bytes(self) -> int:
        """Bytes of one weight, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weight))

    def check(self) -> None:
        """Lower the program, which some implementations refuse only then.

        Raises:
          BadInput: the device or the batch has no such product.
        """
        self.program.lower(*self._arguments())

    def rotate(self, copies: int) -> None:
        """Hold `copies` weights."""
        (first,) = self.rotation
        if self.stacked:
            rotation = [[jnp.tile(leaf, (copies,) + (1,) * (leaf.ndim - 1)) for leaf in first]]
        else:
            rotation = [first] + [[jnp.array(leaf, copy=True) for leaf in first]
                                  for _ in range(copies - 1)]
        self.rotation, self.copies = jax.block_until_ready(rotation), copies

    def error(self) -> float:
        """Relative error of the first product on a sample of its outputs; compiles the program."""
        y = self.program(*self._arguments())[0]
        outputs = np.unique(np.linspace(0, y.shape[1] - 1, SAMPLE_OUTPUTS).astype(int))
        x64 = np.asarray(self.xs[0][:SAMPLE_ROWS], np.float64)
        found = np.asarray(y, np.float64)[:SAMPLE_ROWS, outputs]
        return relative_error(found, self.exact(self.weight, x64, outputs))

    def run(self) -> float:
        """One call on the next weights; returns the seconds of one product."""
        arguments = self._arguments()
        self.turn += len(self.xs)
        if self.traced:
            return device_seconds(lambda: self.program(*arguments)) / len(self.xs)
        begin = time.perf_counter()
        jax.block_until_ready(self.program(*arguments))
        return (time.perf_counter() - begin) / len(self.xs)

    def _arguments(self) -> tuple:
        """Those of the program for the next call."""
        turns = [(self.turn + n) % self.copies for n in range(len(self.xs))]
        weights = self.rotation if self.stacked else [self.rotation[turn] for turn in turns]
        return jax.block_until_ready((self.xs, weights, jnp.asarray(turns, jnp.int32)))


def activations(batch: int, inputs: int, dtype: jax.typing.DTypeLike, seed: int) -> jax.Array:
    """Normal `[b, i]` with one column 60 times as large, as the residual stream of a model has."""
    x = np.random.default_rng([11, seed]).standard_normal((batch, inputs), np.float32)
    x[:, inputs // 3] *= OUTLIER
    return jnp.array(x.astype(dtype))


def relative_error(y: ArrayLike, exact: np.ndarray) -> float:
    """`|y - exact| / |exact|` in float64; NaN where y has one."""
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))
