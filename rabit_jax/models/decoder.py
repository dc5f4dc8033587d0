"""The decoder: embedding, scanned blocks, final norm, head; whole sequences or step by step."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rabit_jax.models.config import ModelConfig
from rabit_jax.models.layers import Block, Context, Embed, Head, RMSNorm, angles

Cache = dict[str, jax.Array]


class Decoder(nn.Module):
    """A Llama-family decoder, `logits = head(norm(blocks(embed(tokens))))`.

    Its params are a plain dict: `embed/embedding [v, d]`, `layers/attn/{q,k,v,o}/kernel` and
    `layers/mlp/{gate,up,down}/kernel [l, i, o]` (with `bias [l, o]` where the config says so),
    `layers/{attn_norm,mlp_norm}/scale [l, d]`, `final_norm/scale [d]`, and `head/kernel [d, v]`
    unless the head is tied. Any kernel may be a weight node with a leading layer axis.

    Example:
      >>> config = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
      ...                      head_dim=8, d_hidden=64)
      >>> params = init_params(config, jax.random.key(0))
      >>> tokens = jnp.ones((1, 5), jnp.int32)
      >>> Decoder(config).apply({"params": params}, tokens).shape
      (1, 5, 64)
    """

    config: ModelConfig

    def setup(self) -> None:
        """Names the parts as the params tree names them."""
        c = self.config
        self.embed = Embed(c)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast), length=c.n_layers,
        )
        self.layers = scanned(c)
        self.final_norm = RMSNorm(c)
        # `head` is a method, so the part has another attribute; its params are still `head`.
        self._head = None if c.tied_head else Head(c, name="head")

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, hidden_states: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Next-token logits of whole sequences.

        Args:
          tokens: `[b, t]` int ids below v.
          mask: `[b, t]` bool, True for real tokens, padding left or right; None means all real.
            Positions are counted over real tokens, padded keys are never attended to; what comes
            out at padded places is finite and means nothing.
          hidden_states: return the residual stream after each block as well.

        Returns:
          float32 `[b, t, v]`, or that and `[l, b, t, d]` in the compute dtype.
        """
        features, hidden = self.features(tokens, mask, hidden_states)
        logits = self.head(features)
        return (logits, hidden) if hidden_states else logits

    def features(
        self, tokens: jax.Array, mask: jax.Array | None = None, hidden_states: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the head reads: `[b, t, d]` after the final norm, and the hidden states or None.

        With `head` this lets a loss project onto the vocabulary in chunks. Arguments as for the
        call; use as `model.apply({"params": params}, tokens, method="features")`.
        """
        t = tokens.shape[1]
        real = jnp.ones((1, t), bool) if mask is None else mask.astype(bool)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, None]
        cos, sin = angles(_positions(real), self.config)
        context = Context(cos, sin, causal & real[:, None, None, :], hidden_states=hidden_states)
        x, _, hidden = self._blocks(tokens, context, None)
        return self.final_norm(x), hidden

    def head(self, features: jax.Array) -> jax.Array:
        """Float32 logits `[..., v]` of `features: [..., d]`."""
        with jax.named_scope("head"):
            return self.embed.attend(features) if self._head is None else self._head(features)

    def step(
        self, tokens: jax.Array, cache: Cache, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Appends `tokens` to what the cache holds: the prompt at first, then one by one.

        Args:
          tokens: `[b, t]` int.
          cache: from `init_cache` or the previous step. It must have t free slots left; a traced
            length cannot be checked here, and a write past the end would land on the last slots.
          mask: `[b, t]` bool, True for real tokens, padding on the left; None means all real.

        Returns:
          float32 logits `[b, v]` of the last token, and the cache with t more slots in use.
        """
        b, t = tokens.shape
        start, slots = cache["length"], cache["valid"].shape[1]
        real = jnp.ones((b, t), bool) if mask is None else mask.astype(bool)
        valid = jax.lax.dynamic_update_slice(cache["valid"], real, (0, start))
        seen = jnp.sum(cache["valid"], axis=1, keepdims=True, dtype=jnp.int32)
        cos, sin = angles(seen + _positions(real), self.config)
        causal = jnp.arange(slots)[None, :] <= start + jnp.arange(t)[:, None]
        context = Context(cos, sin, causal[None, None] & valid[:, None, None, :], start)
        x, written, _ = self._blocks(tokens, context, {"k": cache["k"], "v": cache["v"]})
        logits = self.head(self.final_norm(x[:, -1]))
        return logits, {**written, "valid": valid, "length": start + t}

    def _blocks(
        self, tokens: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Residual stream `[b, t, d]` after all blocks, the cache, and `[l, b, t, d]` or None."""
        layers = jnp.arange(self.config.n_layers)
        (x, cache), hidden = self.layers((self.embed(tokens), cache), layers, context)
        return x, cache, hidden


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 params: normal(initializer_range), norms one, biases zero.

    The projections into the residual stream, `o` and `down`, start `sqrt(2 l)` times smaller.
    Works under `jit`, with `out_shardings` so that each leaf is created where it will live.
    """
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty key-value cache for `Decoder.step`.

    Returns:
      `k`, `v`: `[l, b, slots, n_kv_heads, head_dim]` in the compute dtype; `valid: [b, slots]`
      bool, which slots hold real tokens; `length`: scalar int32, the next slot to write.
    """
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype),
        "valid": jnp.zeros((batch, slots), bool), "length": jnp.zeros((), jnp.int32),
    }


def _positions(real: jax.Array) -> jax.Array:
    """Number of real tokens before each one, `[b, t]` int32; 0 at padding on the left."""
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
