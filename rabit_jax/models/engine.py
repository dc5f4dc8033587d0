"""The decode engine: a key-value cache and one pure step over it, on weights from `prepare`.

Axes: b batch, t time, d model, n key heads, g query heads of each, h head_dim, s cache slots, l
layers, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from rabit_jax.models.config import ModelConfig
from rabit_jax.models.decoder import linear_shapes
from rabit_jax.models.layers import (
    activate,
    embed,
    logits,
    mlp_norm,
    rms_norm,
    score_scale,
    soft_cap,
)
from rabit_jax.models.prepared import Engine, Rows, multiply, prepare
from rabit_jax.models.rotary import Context, local_layers, positions, rotate, seen_from

__all__ = [
    "Cache", "Engine", "attend", "head_logits", "init_cache", "linears", "prepare", "step",
    "write_slots",
]
Cache = dict[str, jax.Array]


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
    engine: Engine, tokens: jax.Array, cache: Cache, mask: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Appends `tokens` to what the cache holds: the prompt at first, then one by one.

    Pure; under `jax.jit(step, donate_argnums=2)` the cache is written in place.

    Args:
      engine: from `prepare`.
      tokens: `[b, t]` int.
      cache: from `init_cache` or the previous step. It must have t free slots left; a traced
        length cannot be checked here, and a write past the end would land on the last slots.
      mask: `[b, t]` bool, True for real tokens, padding on the left; None means all real.

    Returns:
      float32 logits `[b, v]` of the last token, and the cache with t more slots in use.
    """
    c, (b, t) = engine.config, tokens.shape
    start, slots = cache["length"], cache["valid"].shape[1]
    real = jnp.ones((b, t), bool) if mask is None else mask.astype(bool)
    valid = jax.lax.dynamic_update_slice(cache["valid"], real, (0, start))
    seen = jnp.sum(cache["valid"], axis=1, keepdims=True, dtype=jnp.int32)
    context = seen_from(
        c, seen + positions(real), start + jnp.arange(t), jnp.arange(slots), valid)
    block = functools.partial(_block, engine, context, start)
    carry = (embed(engine.embed, tokens, c), cache["k"], cache["v"])
    if any(isinstance(product, tuple) for product in engine.products.values()):
        for layer in range(c.n_layers):
            carry = block(layer, carry)
    else:
        carry = jax.lax.fori_loop(0, c.n_layers, block, carry)
    x, k, v = carry
    last = rms_norm(x[:, -1], engine.norms["final_norm"], c)
    return head_logits(engine, last), {"k": k, "v": v, "valid": valid, "length": start + t}


def _block(
    engine: Engine, context: Context, start: jax.Array, layer: Any, carry: tuple
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer: the residual stream `[b, t, d]` and both caches with its slots written."""
    x, k_cache, v_cache = carry
    c, before = engine.config, mlp_norm(engine.config)
    normed = functools.partial(_normed, engine, layer)
    with jax.named_scope("block"):
        local = local_layers(c)
        view = context.view(local[layer] if isinstance(layer, int) else jnp.asarray(local)[layer])
        q, k, v = (rearrange(y, "b t (n h) -> b t n h", h=c.head_dim)
                   for y in linears(engine, ("q", "k", "v"), normed("attn_norm", x), layer))
        if c.qk_norm:
            q, k = normed("q_norm", q), normed("k_norm", k)
        k_cache = write_slots(k_cache, rotate(k, view), layer, start)
        v_cache = write_slots(v_cache, v, layer, start)
        k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (k_cache, v_cache))
        y = attend(rotate(q, view), k, v, view.allowed, score_scale(c), c.attention_softcap)
        y = linears(engine, ("o",), y, layer)[0]
        x = x + (normed("attn_post_norm", y) if c.post_norms else y)
        gate, up = linears(engine, ("gate", "up"), normed(before, x), layer)
        y = linears(engine, ("down",), activate(gate, c) * up, layer)[0]
        x = x + (normed("mlp_post_norm", y) if c.post_norms else y)
    return x, k_cache, v_cache


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float,
    cap: float | None = None,
) -> jax.Array:
    """`softmax(cap(q k^T scale)) v` of grouped queries, scores and softmax in float32.

    Args:
      q: `[b, t, n g, h]`.
      k, v: `[b, n, s, h]`, read as they lie.
      allowed: `[b, 1, t, s]` bool, which slot each query may see.
      scale: of the scores.
      cap: their soft cap, None for none.

    Returns:
      `[b, t, n g h]` in the dtype of q.
    """
    with jax.named_scope("attend"):
        grouped = rearrange(q, "b t (n g) h -> b n g t h", n=k.shape[1]).astype(k.dtype)
        scores = jnp.einsum("bngth,bnsh->bngts", grouped, k, preferred_element_type=jnp.float32)
        scores = soft_cap(scores * scale, cap)
        # Not -inf: a padded query may see no slot at all, and must stay finite.
        scores = jnp.where(allowed[:, :, None], scores, jnp.finfo(jnp.float32).min)
        share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bngts,bnsh->bngth", share, v, preferred_element_type=jnp.float32)
        return rearrange(y.astype(q.dtype), "b n g t h -> b t (n g h)")


def write_slots(cache: jax.Array, new: jax.Array, layer: Any, start: jax.Array) -> jax.Array:
    """`cache[layer, :, :, start : start + t] = new`, in place; `new: [b, t, n, h]`."""
    new = jnp.swapaxes(new, 1, 2)[None].astype(cache.dtype)
    return jax.lax.dynamic_update_slice(cache, new, (layer, 0, 0, start, 0))


def _normed(engine: Engine, layer: Any, name: str, x: jax.Array) -> jax.Array:
    scale = jax.lax.dynamic_index_in_dim(engine.norms[name], layer, keepdims=False)
    return rms_norm(x, scale, engine.config)


def linears(engine: Engine, names: Sequence[str], x: jax.Array, layer: Any) -> list[jax.Array]:
    """`x W (+ bias)` of each named matrix of one layer: `[b, t, i]` to `[b, t, o]` each."""
    found, shapes = {}, linear_shapes(engine.config)
    for joined, product in engine.products.items():
        members = joined.split()
        if members[0] not in names:
            continue
        y = _multiply(product, x, layer)
        ends = [sum(shapes[m][1] for m in members[: n + 1]) for n in range(len(members))]
        found |= zip(members, jnp.split(y, ends[:-1], axis=-1), strict=True)
    return [_biased(engine, name, found[name], layer) for name in names]


def _multiply(product: Any, x: jax.Array, layer: Any) -> jax.Array:
    """`x W` of one layer in `x.dtype`."""
    if not isinstance(product, tuple):
        return product.matmul_at(x, layer)
    return multiply(x, product[layer])


def _biased(engine: Engine, name: str, y: jax.Array, layer: Any) -> jax.Array:
    if name not in engine.biases:
        return y
    bias = jax.lax.dynamic_index_in_dim(engine.biases[name], layer, keepdims=False)
    return y + bias.astype(y.dtype)[None, None]


def head_logits(engine: Engine, x: jax.Array) -> jax.Array:
    """Float32 logits `[b, v]` of `x: [b, d]`."""
    cap = engine.config.final_softcap
    with jax.named_scope("head"):
        head = engine.embed.T if engine.head is None else engine.head
        if hasattr(head, "matmul_at"):
            return soft_cap(head.matmul_at(x.astype(jnp.float32), 0), cap)
        return soft_cap(head.matmul(x) if isinstance(head, Rows) else logits(x, head), cap)
