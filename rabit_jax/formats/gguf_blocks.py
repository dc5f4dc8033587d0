"""Blocks of quantised numbers of llama.cpp that hold integers and steps without rounding.

Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. What is written
here is decoded by the `gguf` package, and by `decode` where that package has no decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.formats.exact_levels import Levels


class BlockType(NamedTuple):
    """A type of blocks of consecutive inputs of one output.

    Attributes:
      name: in llama.cpp.
      size: numbers of a block.
      lowest, highest: of the integers that it holds.
      odd: whether it holds odd integers alone.
      shifted: whether it holds codes and a lowest level instead of integers.
      encode: numbers `[b, size]` int16, steps and lowest levels `[b, 1]` float16 (zeros where a
        weight has none) -> bytes `[b, n]`.
    """

    name: str
    size: int
    lowest: int
    highest: int
    odd: bool
    shifted: bool
    encode: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def why_not(self, levels: Levels) -> str | None:
        """Why these levels cannot be held exactly, None where they can."""
        if levels.inputs % self.size:
            return f"has {levels.inputs} inputs, no multiple of its blocks of {self.size}"
        if levels.group % self.size and levels.group < levels.inputs:
            return f"has groups of {levels.group} inputs, no multiple of its blocks of {self.size}"
        numbers = levels.codes if self.shifted else levels.integers
        if numbers is None:
            return ("has no codes" if self.shifted else
                    "has levels that are no whole multiples of their steps")
        if numbers.min() < self.lowest or numbers.max() > self.highest:
            return (f"has levels from {numbers.min()} to {numbers.max()} steps, beyond its "
                    f"{self.lowest} to {self.highest}")
        if self.odd and not (numbers & 1).all():
            return "has levels at even multiples of its step"
        return None

    def bytes_of(self, levels: Levels) -> np.ndarray:
        """Rows of blocks, uint8 `[o, bytes]`, of levels that `why_not` accepts."""
        numbers = levels.codes if self.shifted else levels.integers
        assert numbers is not None
        which = np.arange(0, levels.inputs, self.size) // levels.group  # the group of each block

        def of_blocks(values: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(values[:, which], "<f2").reshape(-1, 1)

        steps = of_blocks(levels.steps)
        lowest = np.zeros_like(steps) if levels.lowest is None else of_blocks(levels.lowest)
        return self.encode(numbers.reshape(-1, self.size), steps, lowest).reshape(len(numbers), -1)


def _q1_0(integers: np.ndarray, steps: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The step, then a bit for each number, least significant first, 1 for +."""
    bits = np.packbits(integers > 0, axis=1, bitorder="little")
    return np.hstack([steps.view(np.uint8), bits])


def _tq2_0(integers: np.ndarray, steps: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Two bits for each of -1, 0, 1, then the step."""
    return np.hstack([_quarters(integers + 1), steps.view(np.uint8)])


def _q2_k(integers: np.ndarray, steps: np.ndarray, _: np.ndarray) -> np.ndarray:
    """`d sc q - dmin m` with sc = 2 and m = 3 in all 16 parts, both units the step: `step (2 q -
    3)`."""
    scales = np.full((len(integers), 16), 2 | 3 << 4, np.uint8)
    units = steps.view(np.uint8)
    return np.hstack([scales, _quarters((integers + 3) // 2), units, units])


def _quarters(codes: np.ndarray) -> np.ndarray:
    """Codes of two bits `[b, 256]` -> bytes `[b, 64]`: byte j of each half has numbers j, j + 32,
    j + 64 and j + 96 of it."""
    parts = codes.astype(np.uint8).reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6])[:, None]
    return np.bitwise_or.reduce(parts, axis=2).astype(np.uint8).reshape(len(codes), 64)


def _q4_0(integers: np.ndarray, steps: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The step, then `integer + 8` in halves of bytes."""
    return np.hstack([steps.view(np.uint8), _halves(integers + 8)])


def _q4_1(codes: np.ndarray, steps: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """The step, the lowest level, then codes in halves of bytes."""
    return np.hstack([steps.view(np.uint8), lowest.view(np.uint8), _halves(codes)])


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits `[b, 32]` -> bytes `[b, 16]`: number j low, number j + 16 high."""
    codes = codes.astype(np.uint8)
    return codes[:, :16] | codes[:, 16:] << 4


def _q8_0(integers: np.ndarray, steps: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The step, then a byte for each integer."""
    return np.hstack([steps.view(np.uint8), integers.astype(np.int8).view(np.uint8)])


# From the smallest to the largest.
TYPES = {one.name: one for one in (
    BlockType("Q1_0", 128, -1, 1, True, False, _q1_0),     # 1.125 bits a weight
    BlockType("TQ2_0", 256, -1, 1, False, False, _tq2_0),  # 2.0625
    BlockType("Q2_K", 256, -3, 3, True, False, _q2_k),     # 2.625
    BlockType("Q4_0", 32, -8, 7, False, False, _q4_0),     # 4.5
    BlockType("Q4_1", 32, 0, 15, False, True, _q4_1),      # 5
    BlockType("Q8_0", 32, -128, 127, False, False, _q8_0),  # 8.5
)}


def smallest(levels: Levels, name: str) -> BlockType:
    """The type of the fewest bits that holds these levels exactly.

    Raises:
      BadInput: there is none; the message says why the most general ones do not.
    """
    reasons = {}
    for one in TYPES.values():
        reasons[one.name] = one.why_not(levels)
        if reasons[one.name] is None:
            return one
    raise BadInput(f"{name} fits no block of llama.cpp exactly: for Q4_0 it {reasons['Q4_0']}, for "
                   f"Q8_0 it {reasons['Q8_0']}; export gguf-f32, or quantise with groups that are "
                   "multiples of 32")


def decode(rows: np.ndarray, name: str) -> np.ndarray | None:
    """Rows of blocks that the `gguf` package does not decode, uint8 `[o, bytes]` -> float32 `[o,
    i]`; None for a type that is not known here either."""
    if name != "Q1_0":
        return None
    blocks = rows.reshape(-1, 18)
    steps = blocks[:, :2].copy().view("<f2").astype(np.float32)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(signs == 1, steps, -steps).reshape(len(rows), -1)
