"""Values that a group of consecutive inputs shares, per output: `[..., n, o]` for `[..., i, o]`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Shaped

from rabit_jax.types import Array


def group_count(inputs: int, group: int) -> int:
    """Number of groups, `n = ceil(i / group)`; the last one may be shorter."""
    return -(-inputs // group)


def spread(
    values: Shaped[Array, "*l n o"], group: int, inputs: int
) -> Shaped[Array, "*l i o"]:
    """Give every input its group's value: `[..., n, o]` -> `[..., i, o]`."""
    return jnp.repeat(values, group, axis=-2)[..., :inputs, :]


def by_group(x: Shaped[Array, "*l i o"], group: int) -> Shaped[Array, "*l n group o"]:
    """Split the inputs: `[..., i, o]` -> `[..., n, group, o]`, the last group padded with 0."""
    *lead, i, o = x.shape
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -i % group), (0, 0)])
    return padded.reshape(*lead, -1, group, o)


def group_sum(x: Shaped[Array, "*l i o"], group: int) -> Shaped[Array, "*l n o"]:
    """Sum over the inputs of each group: `[..., i, o]` -> `[..., n, o]`."""
    return by_group(x, group).sum(axis=-2)
