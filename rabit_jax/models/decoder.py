"""The decoder for training and evaluation: embedding, scanned blocks, final norm, head."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.layers import Block, Embed, Head, RMSNorm, soft_cap
from rabit_jax.models.rotary import local_layers, make_context


class Decoder(nn.Module):
    """A decoder, `logits = head(norm(blocks(embed(tokens))))`; the config makes the family.

    Its params are a plain dict: `embed/embedding [v, d]`, `layers/attn/{q,k,v,o}/kernel` and
    `layers/mlp/{gate,up,down}/kernel [l, i, o]` (with `bias [l, o]` where the config says so),
    `layers/{attn_norm,mlp_norm}/scale [l, d]` (with `post_norms` `attn_norm`, `attn_post_norm`,
    `mlp_pre_norm`, `mlp_post_norm`), with `qk_norm` `layers/attn/{q_norm,k_norm}/scale [l, h]`,
    `final_norm/scale [d]`, and `head/kernel [d, v]` unless the head is tied. Any kernel may be a
    weight node with a leading layer axis.

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
        real = jnp.ones((1, tokens.shape[1]), bool) if mask is None else mask.astype(bool)
        context = make_context(self.config, real, hidden_states)
        local = jnp.asarray(local_layers(self.config))
        x, hidden = self.layers(self.embed(tokens), local, context)
        return self.final_norm(x), hidden

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """What the first block reads: `[b, t]` int to `[b, t, d]`."""
        return self.embed(tokens)

    def normed(self, x: jax.Array) -> jax.Array:
        """What the head reads, of what the last block leaves: the final norm, `[b, t, d]`."""
        return self.final_norm(x)

    def head(self, features: jax.Array) -> jax.Array:
        """Float32 logits `[..., v]` of `features: [..., d]`."""
        with jax.named_scope("head"):
            y = self.embed.attend(features) if self._head is None else self._head(features)
            return soft_cap(y, self.config.final_softcap)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 params: normal(initializer_range), factors of norms one, biases zero.

    The projections into the residual stream, `o` and `down`, start `sqrt(2 l)` times smaller.
    Works under `jit`, with `out_shardings` so that each leaf is created where it will live.
    """
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `config`, by path: `{"embed/embedding": (v, d), ...}`."""
    tree = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


@functools.cache
def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs `(i, o)` of each matrix of a block: `{"q": (d, n h), ...}`."""
    shapes = param_shapes(config).items()
    return {path.split("/")[2]: shape[1:] for path, shape in shapes
            if path.startswith("layers/") and path.endswith("/kernel")}


def check_params(leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises BadInput where params by path do not have the names and shapes of the config."""
    if odd := sorted(set(leaves) ^ set(shapes)):
        what = "extra" if odd[0] in leaves else "missing"
        raise BadInput(f"{what} parameter {odd[0]}: the params do not fit the model's config")
    for path, shape in shapes.items():
        if tuple(leaves[path].shape) != shape:
            raise BadInput(f"parameter {path} is {tuple(leaves[path].shape)}, the config wants "
                           f"{shape}")
