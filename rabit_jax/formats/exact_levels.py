"""A packed matrix as integers times one step per group of inputs, which other formats can store.

    W_hat[i, o] = step[o, m] integers[o, i],   m = floor(i / group)

Formats of other runtimes hold such integers of a few bits and 16-bit steps, and nothing else: no
scale for each input, no levels at odd distances. What is not of that form is refused with its
reason; nothing is ever rounded to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.types import Array, Weight
from rabit_jax.weights.group_uniform import PackedGroupUniform
from rabit_jax.weights.grouped_sign import PackedGroupedSign
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.uniform_sign import PackedUniformSign

ADVICE = "quantise with init.spec={type: uniform, k: 2, group: 128}, or export the dense model"
ROUNDED = 2.0**-10  # what two roundings to 16 bits, of a step and of its multiple, differ by


class Levels(NamedTuple):
    """`W_hat^T = steps integers`, or `steps codes + lowest` where it was quantised so.

    Attributes:
      integers: int16 `[o, i]`; None where the levels are no whole multiples of their steps.
      steps: float16 `[o, n]`, `n = ceil(i / group)`.
      group: inputs that share a step.
      codes: int16 `[o, i]`, 0 and more; None where a weight has none.
      lowest: float16 `[o, n]`, the level of code 0; None with `codes`.
    """

    integers: np.ndarray | None
    steps: np.ndarray
    group: int
    codes: np.ndarray | None = None
    lowest: np.ndarray | None = None

    @property
    def inputs(self) -> int:
        """`i`."""
        held = self.codes if self.integers is None else self.integers
        assert held is not None
        return held.shape[1]

    def whole(self, name: str) -> np.ndarray:
        """The integers.

        Raises:
          BadInput: levels that are no whole multiples of their steps; the message begins with
            `name`.
        """
        if self.integers is None:
            raise BadInput(f"{name} has levels that are no whole multiples of their steps, as "
                           "training leaves those of round_to_nearest, and the format has integer "
                           f"zero points: {ADVICE}")
        return self.integers

    def rows(self, order: np.ndarray) -> Levels:
        """The levels with their outputs in another order, int `[o]`."""
        held = (self.integers, self.steps, self.codes, self.lowest)
        integers, steps, codes, lowest = (None if a is None else a[order] for a in held)
        assert steps is not None
        return Levels(integers, steps, self.group, codes, lowest)


def levels_of(node: Weight | Array, name: str) -> Levels:
    """The levels of one packed matrix `[i, o]`.

    Args:
      node: a `PackedUniformSign` or `PackedGroupUniform` without stacked layers.
      name: of the matrix, for messages.

    Raises:
      BadInput: any other weight, with what it has that integers and steps cannot hold; the message
        begins with `name`.
    """
    if isinstance(node, PackedUniformSign):
        return _of_signs(node, name)
    if isinstance(node, PackedGroupUniform):
        return _of_codes(node)
    if isinstance(node, PackedSign | PackedGroupedSign):
        why = "a scale for each input"
    elif hasattr(node, "dense"):
        why = f"the form {type(node).__name__}"
    else:
        raise BadInput(f"{name} is not quantised: the format stores integers and steps of every "
                       f"matrix of the blocks; {ADVICE}")
    raise BadInput(f"{name} has {why}, and the format has one step for each group of inputs and "
                   f"nothing else: {ADVICE}")


def _of_signs(node: PackedUniformSign, name: str) -> Levels:
    s, parts = np.asarray(node.s, np.float16).T, np.float16(2 ** (node.k - 1))
    steps = s / parts
    if not np.array_equal(steps * parts, s):
        raise BadInput(f"{name} has a step below what 16 bits hold exactly, 1.2e-04: export the "
                       "dense model")
    return Levels(np.asarray(node.integers(), np.int16).T, steps, node.group)


def _of_codes(node: PackedGroupUniform) -> Levels:
    """Codes, and integers where every lowest level is a whole number of steps.

    Both were rounded to 16 bits on their own, so they agree up to that rounding alone, and the
    weight of whole multiples is as close to what was rounded as the stored one.
    """
    codes = np.asarray(node.codes(), np.int16).T
    steps, lowest = (np.asarray(a, np.float16).T for a in (node.s, node.c))
    wide, low = steps.astype(np.float64), lowest.astype(np.float64)
    zeros = np.rint(np.divide(-low, wide, out=np.zeros_like(wide), where=wide != 0))
    if (np.abs(low + wide * zeros) > ROUNDED * np.abs(low)).any():
        return Levels(None, steps, node.group, codes, lowest)
    spread = np.repeat(zeros.astype(np.int16), node.group, axis=1)[:, : codes.shape[1]]
    return Levels(codes - spread, steps, node.group, codes, lowest)
