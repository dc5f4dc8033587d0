"""The decode engine: a key-value cache and one pure step over it, on weights from `prepare`.

Axes: b batch, t time, d model, n key heads, h head_dim, s cache slots, l layers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from rabit_jax.models.block import Slots, block, rms_norm, soft_cap
from rabit_jax.models.cache import (
    PIECE,
    Layer,
    Stores,
    empty_stores,
    kinds,
    of_kind,
    pattern,
    ring_places,
    ring_slots,
    windowed,
    with_kind,
)
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import embed, logits
from rabit_jax.models.prepared import Engine, Rows, layer_at, multiply, prepare
from rabit_jax.models.rotary import Context, positions, seen_from
from rabit_jax.types import Array
from rabit_jax.weights.laid import LaidTable

__all__ = [
    "Cache", "Engine", "embedded", "head_logits", "init_cache", "over_layers", "prepare", "step",
    "advance", "through",
]
Cache: TypeAlias = dict[str, Any]
Carry = TypeVar("Carry")


def init_cache(config: ModelConfig, batch: int, slots: int, bits: int = 16) -> Cache:
    """An empty key-value cache for `step`; take the config of the engine.

    Args:
      config: of the engine.
      batch: rows.
      slots: tokens that fit.
      bits: 16 for the compute dtype, on a CPU float32; 8 or 4 for `cache.Codes`. An engine has
        `cache_bits`.

    Returns:
      `k`, `v`: `[l, b, n, s, h]`, or `cache.ByKind` where some layers have a window, which keep
      `cache.ring_slots` of it; `valid: [b, s]` bool, which places hold real tokens; `length`:
      scalar int32, the next place to write.
    """
    return {
        "k": empty_stores(config, batch, slots, bits),
        "v": empty_stores(config, batch, slots, bits),
        "valid": jnp.zeros((batch, slots), bool), "length": jnp.zeros((), jnp.int32),
    }


def step(
    engine: Engine, tokens: Int[Array, "b t"], cache: Cache, mask: Bool[Array, "b t"] | None = None
) -> tuple[Float[Array, "b v"], Cache]:
    """Appends `tokens` to what the cache holds: the prompt at first, then one by one.

    Pure; under `jax.jit(step, donate_argnums=2)` the cache is written in place.

    Args:
      engine: from `prepare`.
      tokens: ids below v.
      cache: from `init_cache` or the previous step. It must have t free slots left; a traced
        length cannot be checked here, and a write past the end would land on the last slots.
      mask: True for real tokens, padding on the left; None means all real.

    Returns:
      float32 logits of the last token, and the cache with t more slots in use.
    """
    real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    t = tokens.shape[1]
    if t > PIECE and windowed(engine.config):
        # A ring holds one piece besides its window.
        first, pieces = t % PIECE or PIECE, -(-t // PIECE) - 1
        _, cache = advance(engine, tokens[:, :first], cache, real[:, :first])

        def further(n: Array, cache: Cache) -> Cache:
            at = (0, first + n * PIECE)
            piece, own = (jax.lax.dynamic_slice(a, at, (a.shape[0], PIECE)) for a in (tokens, real))
            return advance(engine, piece, cache, own)[1]

        cache = jax.lax.fori_loop(0, pieces - 1, further, cache)
        tokens, real = tokens[:, -PIECE:], real[:, -PIECE:]
    x, cache = advance(engine, tokens, cache, real)
    last = rms_norm(x[:, -1], engine.final_norm, engine.config)
    return head_logits(engine, last), cache


def advance(
    engine: Engine, tokens: Int[Array, "b t"], cache: Cache, real: Bool[Array, "b t"]
) -> tuple[Float[Array, "b t d"], Cache]:
    """What the last layer returns, and the cache with the tokens in it."""
    c, t = engine.config, tokens.shape[1]
    start, slots = cache["length"], cache["valid"].shape[1]
    valid = jax.lax.dynamic_update_slice(cache["valid"], real, (0, start))
    seen = jnp.sum(cache["valid"], axis=1, keepdims=True, dtype=jnp.int32)
    ring = None
    if windowed(c):
        places = ring_places(start + t - 1, ring_slots(c, slots))
        ring = places, valid[:, jnp.maximum(places, 0)] & (places >= 0)[None]
    context = seen_from(
        c, seen + positions(real), start + jnp.arange(t), jnp.arange(slots), valid, ring=ring)
    x, k, v = through(engine, tokens, context, cache["k"], cache["v"], start)
    return x, {"k": k, "v": v, "valid": valid, "length": start + t}


def through(
    engine: Engine, tokens: Int[Array, "b t"], context: Context, k: Stores, v: Stores,
    start: Array, kind: type[Slots] = Slots,
) -> tuple[Float[Array, "b t d"], Stores, Stores]:
    """What the last layer returns, and keys and values with those of the tokens.

    Args:
      engine: from `prepare`.
      tokens: ids below v.
      context: over the slots of each kind of layer.
      k, v: the stores of all layers.
      start: place of the first token.
      kind: how `start` is read.
    """
    def one(layer: Layer, carry: tuple[Array, Stores, Stores]) -> tuple[Array, Stores, Stores]:
        x, k, v = carry
        here = kind(of_kind(k, layer.local), of_kind(v, layer.local), layer.own, start, layer.local)
        x, here = block(layer_at(engine, layer.number), x, context.view(layer.local),
                        engine.config, here, multiply)
        return x, with_kind(k, layer.local, here.k), with_kind(v, layer.local, here.v)

    return over_layers(engine, one, (embedded(engine, tokens), k, v))


def embedded(engine: Engine, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """What the first layer reads: rows of the embedding."""
    with jax.named_scope("embed"):
        # XLA's CPU widens a 16-bit table to take rows of it, and in a loop would widen all of it
        # before the first turn; what depends on the tokens stays inside, where rows are enough.
        table, tokens = jax.lax.optimization_barrier((engine.embed, tokens))
        return embed(table, tokens, engine.config)


def over_layers(engine: Engine, body: Callable[[Layer, Carry], Carry], carry: Carry) -> Carry:
    """`carry = body(layer, carry)` for all layers.

    One loop on the device, of which a turn is a period of the kinds of layers (one layer, or six of
    Gemma 3), unless the engine holds a separate matrix for each layer: a loop would copy each of
    them before it multiplies.
    """
    layers = kinds(engine.config)
    period = pattern(np.array([layer.local for layer in layers]))
    turns = len(layers) // period
    if any(isinstance(product, tuple) for product in engine.products.values()):
        turns = 0
    counts = {kind: sum(one.local == kind for one in layers[:period]) for kind in (False, True)}

    def turn(n: Array, carry: Carry) -> Carry:
        for one in layers[:period]:
            here = one._replace(number=n * period + one.number,
                                own=n * counts[one.local] + one.own)
            carry = body(here, carry)
        return carry

    carry = jax.lax.fori_loop(0, turns, turn, carry) if turns else carry
    for layer in layers[turns * period :]:
        carry = body(layer, carry)
    return carry


def head_logits(engine: Engine, x: Float[Array, "b d"]) -> Float[Array, "b v"]:
    """Float32 logits of what the final norm returns."""
    head: Any = engine.embed.T if engine.head is None else engine.head
    with jax.named_scope("head"):
        if isinstance(head, (Rows, LaidTable)):
            y = head.matmul(x)
        elif hasattr(head, "matmul_at"):
            y = head.matmul_at(x.astype(jnp.float32), 0)
        else:
            y = logits(x, head)
        return soft_cap(y, engine.config.final_softcap)
