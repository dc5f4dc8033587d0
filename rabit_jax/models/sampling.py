"""The choice of a token from logits: greedy, from the whole distribution, or from its nucleus."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pick(
    logits: jax.Array, key: jax.Array, mode: str, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token per row of float32 `logits: [b, v]`, as `[b]` int32.

    `mode` is "greedy" (argmax), "sample" (all of `softmax(logits / temperature)`) or "nucleus"
    (its likeliest tokens until their probability reaches `top_p`, renormalised).
    """
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if mode == "sample":
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    # The likeliest token always stays, whatever rounding does to its `before`.
    keep = (before < top_p) | (jnp.arange(p.shape[-1]) == 0)[None]
    rank = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
