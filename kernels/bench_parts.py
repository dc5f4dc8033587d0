"""A decoding step and its parts as compiled programs over a prepared engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from rabit_jax.models import Engine


@partial(jax.jit, static_argnums=3, donate_argnums=2)
def decode_tokens(engine: Engine, token: jax.Array, cache: Any, count: int) -> tuple:
    """`count` more tokens, the likeliest each: the last `[b]`, and the cache."""
    from rabit_jax.models import step

    def one(_, state):
        logits, cache = step(engine, state[0][:, None], state[1])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, count, one, (token, cache))


@jax.jit
def block_linears(engine: Engine, x: jax.Array) -> jax.Array:
    """The linears of all blocks in turn, without attention: `x: [b, 1, d]` -> the same."""
    from rabit_jax.models.engine import linears

    def block(layer, x):
        q, k, v = linears(engine, ("q", "k", "v"), x, layer)
        # A trace of k and v, or the compiler would leave them out.
        trace = 1e-3 * (jnp.mean(k, axis=-1, keepdims=True) + jnp.mean(v, axis=-1, keepdims=True))
        x = linears(engine, ("o",), q, layer)[0] + trace
        gate, up = linears(engine, ("gate", "up"), x, layer)
        x = linears(engine, ("down",), jax.nn.silu(gate) * up, layer)[0]
        # Kept at size 1 through any number of layers, as norms and residuals do.
        size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True))
        return (x.astype(jnp.float32) / (size + 1e-6)).astype(x.dtype)

    return over_layers(engine, block, x)


@partial(jax.jit, donate_argnums=(2, 3))
def attention(
    engine: Engine, heads: dict[str, jax.Array], k: jax.Array, v: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotation, cache and attention of all blocks for one token at slot `start`.

    Args:
      engine: for its config and how it goes through its layers.
      heads: `q`, `k`, `v` `[b, 1, heads, h]` of the new token.
      k, v: the cache `[l, b, n, s, h]`.
      start: int32 scalar.

    Returns:
      `[b, 1, n g h]` and the cache.
    """
    from rabit_jax.models.engine import attend, write_slots
    from rabit_jax.models.layers import score_scale
    from rabit_jax.models.rotary import seen_from

    slots, c = jnp.arange(k.shape[3]), engine.config
    view = seen_from(c, start[None, None], start[None], slots, slots[None] >= 0).full

    def block(layer, carry):
        q, k_cache, v_cache = carry
        k_cache = write_slots(k_cache, _rotated(heads["k"], view), layer, start)
        v_cache = write_slots(v_cache, heads["v"], layer, start)
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k_cache, v_cache))
        y = attend(_rotated(q, view), k, v, view.allowed, score_scale(c), c.attention_softcap)
        # What one layer gives is asked of the next, so that none can be left out or moved.
        return y.reshape(q.shape), k_cache, v_cache

    y, k, v = over_layers(engine, block, (heads["q"], k, v))
    return y.reshape(*y.shape[:2], -1), k, v


def _rotated(x: jax.Array, view: Any) -> jax.Array:
    from rabit_jax.models.rotary import rotate

    return rotate(x, view)


@jax.jit
def head(engine: Engine, x: jax.Array) -> jax.Array:
    """The likeliest token `[b]` of `x: [b, d]`."""
    from rabit_jax.models.engine import head_logits

    return jnp.argmax(head_logits(engine, x), axis=-1)


def over_layers(engine: Engine, block: Callable, carry: Any) -> Any:
    """`carry = block(layer, carry)` for all layers, in the way `step` goes through them."""
    layers = engine.config.n_layers
    if not any(isinstance(product, tuple) for product in engine.products.values()):
        return jax.lax.fori_loop(0, layers, block, carry)
    for layer in range(layers):
        carry = block(layer, carry)
    return carry
