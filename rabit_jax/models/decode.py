"""Text generation: prefill, then one token at a time from a key-value cache, all on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.models.decoder import Decoder, init_cache


def generate(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_ids: Sequence[int] = (),
) -> jax.Array:
    """Continues a batch of prompts; params may be dense, in training form or packed.

    Args:
      model: the decoder; `model.config.eos_ids` holds its own end tokens.
      params: its params tree.
      tokens: `[b, t]` int prompts, shorter ones padded on the left.
      mask: `[b, t]` bool, True for real tokens; None means all real.
      max_new_tokens: number of tokens to append, at least 1.
      temperature: 0 takes the likeliest token; else samples from `softmax(logits / temperature)`.
      top_p: samples only from the smallest set of likeliest tokens whose probability reaches it.
      key: for sampling; the same key gives the same text.
      eos_ids: a row ends at any of these, and the loop when all rows have ended.

    Returns:
      `[b, max_new_tokens]` int32; after its end a row is filled with the first of `eos_ids`.

    Raises:
      BadInput: an empty prompt, padding on the right, token ids outside the vocabulary, more
        tokens than the model has positions, or settings out of range.
    """
    tokens, mask = _prompt(model, tokens, mask, max_new_tokens)
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise BadInput(f"temperature {temperature} and top_p {top_p}: wanted temperature >= 0 and "
                       "0 < top_p <= 1")
    if temperature > 0 and key is None:
        raise BadInput("sampling with temperature > 0 wants a key, such as jax.random.key(0)")
    key = jax.random.key(0) if key is None else key
    mode = "greedy" if temperature == 0 else ("sample" if top_p == 1 else "nucleus")
    eos = tuple(int(i) for i in eos_ids)
    return _run(model, max_new_tokens, mode, eos, params, tokens, mask, key,
                jnp.float32(temperature), jnp.float32(top_p))


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
    model: Decoder, max_new: int, mode: str, eos: tuple[int, ...], params: Any, tokens: jax.Array,
    mask: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array,
) -> jax.Array:
    """Prefill and the decoding loop; `[b, max_new]` int32."""
    b, t = tokens.shape
    fill = eos[0] if eos else 0
    step = functools.partial(model.apply, {"params": params}, method="step")
    choose = functools.partial(pick, mode=mode, temperature=temperature, top_p=top_p)

    def ended(token: jax.Array) -> jax.Array:
        return (token[:, None] == jnp.array(eos, jnp.int32)[None]).any(axis=1)

    def unfinished(state: tuple) -> jax.Array:
        i, _, done, *_ = state
        return (i < max_new) & ~done.all()

    def extend(state: tuple) -> tuple:
        i, token, done, out, cache, key = state
        key, now = jax.random.split(key)
        logits, cache = step(token[:, None], cache)
        token = jnp.where(done, fill, choose(logits, now))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return i + 1, token, done | ended(token), out, cache, key

    key, now = jax.random.split(key)
    logits, cache = step(tokens, init_cache(model.config, b, t + max_new), mask)
    token = choose(logits, now)
    out = jnp.full((b, max_new), fill, jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, ended(token), out, cache, key)
    return jax.lax.while_loop(unfinished, extend, state)[3]


def _prompt(
    model: Decoder, tokens: Any, mask: Any, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts and their mask as `[b, t]` int32 and bool, checked."""
    c = model.config
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise BadInput(f"empty prompt: tokens have shape {tokens.shape}, wanted [b, t] with at "
                       "least one token in each row")
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != tokens.shape or not mask[:, -1].all():
        raise BadInput(f"mask {mask.shape} for prompts {tokens.shape}: wanted the same shape, rows "
                       "padded on the left and none empty")
    if tokens.min() < 0 or tokens.max() >= c.vocab_size:
        raise BadInput(f"prompt holds token id {tokens.max()} or {tokens.min()}, the vocabulary "
                       f"has 0..{c.vocab_size - 1}; use the model's own tokenizer")
    longest = int(mask.sum(axis=1).max())
    if max_new_tokens < 1 or longest + max_new_tokens > c.max_position:
        raise BadInput(f"{longest} prompt tokens and {max_new_tokens} new ones, the model has "
                       f"{c.max_position} positions and makes at least 1; ask for fewer")
    return tokens.astype(np.int32), mask
