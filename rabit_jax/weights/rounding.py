"""Round-to-nearest: the floor that every method has to clear."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.types import Array

F32 = jnp.float32


def round_to_nearest(
    w: Float[Array, "... i o"], bits: int = 2, group: int = 128
) -> Float[Array, "... i o"]:
    """Asymmetric round-to-nearest per group of `group` inputs: `s (clip(round(w / s) + z, 0, 2^bits
    - 1) - z)`.

    `s = (max - min) / (2^bits - 1)` and `z = round(-min / s)` over a group, the range widened to
    hold 0. With 16-bit `s` and `z` it takes `bits + 32 / group` bits per weight.

    Args:
      w: `[..., i, o]` float; the last group of inputs may be shorter.
      bits: bits per code.
      group: inputs that share a scale.

    Returns:
      `[..., i, o]` float32.
    """
    *lead, i, o = w.shape
    pad = [(0, 0)] * len(lead) + [(0, -i % group), (0, 0)]
    groups = jnp.pad(w.astype(F32), pad).reshape(*lead, -1, group, o)
    low = jnp.minimum(groups.min(axis=-2, keepdims=True), 0)
    high = jnp.maximum(groups.max(axis=-2, keepdims=True), 0)
    top = 2**bits - 1
    scale = jnp.maximum((high - low) / top, jnp.finfo(F32).tiny)
    zero = jnp.round(-low / scale)
    codes = jnp.clip(jnp.round(groups / scale) + zero, 0, top)
    return (scale * (codes - zero)).reshape(*lead, -1, o)[..., :i, :]
