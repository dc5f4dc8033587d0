"""The decode engine: a key-value cache and one pure step over it, on weights from `prepare`.

Axes: b batch, t time, d model, n key heads, h head_dim, s cache slots, l layers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from rabit_jax.models.block import Slots, block, rms_norm, soft_cap
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import embed, logits
from rabit_jax.models.prepared import Engine, Rows, layer_at, multiply, prepare
from rabit_jax.models.rotary import local_layers, positions, seen_from
from rabit_jax.types import Array
from rabit_jax.weights.laid import LaidTable

__all__ = [
    "Cache", "Engine", "embedded", "head_logits", "init_cache", "over_layers", "prepare", "step",
]
Cache: TypeAlias = dict[str, Array]
Carry = TypeVar("Carry")


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty key-value cache for `step`; take the config of the engine.

    Returns:
      `k`, `v`: `[l, b, n, s, h]` in the compute dtype, on a CPU in float32; `valid: [b, s]` bool,
      which slots hold real tokens; `length`: scalar int32, the next slot to write.
    """
    shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_dim)
    # XLA's CPU widens a whole bfloat16 cache to write one slot of it.
    dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    return {
        "k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype),
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
    c, (b, t) = engine.config, tokens.shape
    start, slots = cache["length"], cache["valid"].shape[1]
    real = jnp.ones((b, t), bool) if mask is None else mask.astype(bool)
    valid = jax.lax.dynamic_update_slice(cache["valid"], real, (0, start))
    seen = jnp.sum(cache["valid"], axis=1, keepdims=True, dtype=jnp.int32)
    context = seen_from(
        c, seen + positions(real), start + jnp.arange(t), jnp.arange(slots), valid)
    local = local_layers(c)

    def one(layer: int | Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, k, v = carry
        view = context.view(local[layer] if isinstance(layer, int) else jnp.asarray(local)[layer])
        slots = Slots(k, v, layer, start)
        x, slots = block(layer_at(engine, layer), x, view, c, slots, multiply)
        return x, slots.k, slots.v

    x, k, v = over_layers(engine, one, (embedded(engine, tokens), cache["k"], cache["v"]))
    last = rms_norm(x[:, -1], engine.final_norm, c)
    return head_logits(engine, last), {"k": k, "v": v, "valid": valid, "length": start + t}


def embedded(engine: Engine, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """What the first layer reads: rows of the embedding."""
    with jax.named_scope("embed"):
        # XLA's CPU widens a 16-bit table to take rows of it, and in a loop would widen all of it
        # before the first turn; what depends on the tokens stays inside, where rows are enough.
        table, tokens = jax.lax.optimization_barrier((engine.embed, tokens))
        return embed(table, tokens, engine.config)


def over_layers(
    engine: Engine, body: Callable[[int | Array, Carry], Carry], carry: Carry
) -> Carry:
    """`carry = body(layer, carry)` for all layers.

    One loop on the device, unless the engine holds a separate matrix for each layer: a loop would
    copy each of them before it multiplies.
    """
    layers = engine.config.n_layers
    if not any(isinstance(product, tuple) for product in engine.products.values()):
        return jax.lax.fori_loop(0, layers, body, carry)
    for layer in range(layers):
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
