"""Positions, rotary angles, and which key each query may see.

Axes: b batch, t time, n heads, h head_dim, s keys, l layers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rabit_jax.models.config import ModelConfig


class View(struct.PyTreeNode):
    """How one kind of layer looks at the sequence.

    Attributes:
      cos, sin: `[b or 1, t, 1, h / 2]` float32, of the rotary angles.
      allowed: `[b or 1, 1, t, s]` bool, which key each query may see.
    """

    cos: jax.Array
    sin: jax.Array
    allowed: jax.Array


class Context(struct.PyTreeNode):
    """What every block of one forward pass shares.

    Attributes:
      full: the view of layers that see all keys before them.
      local: that of layers with a sliding window; None where the model has none.
      hidden_states: whether blocks return the residual stream.
    """

    full: View
    local: View | None = None
    hidden_states: bool = struct.field(pytree_node=False, default=False)

    def view(self, local: jax.Array | bool) -> View:
        """The view of a layer; `local` is a scalar bool, traced or not."""
        if self.local is None:
            return self.full
        if isinstance(local, (bool, np.bool_)):
            return self.local if local else self.full
        return jax.tree.map(lambda a, b: jnp.where(local, a, b), self.local, self.full)


def make_context(config: ModelConfig, real: jax.Array, hidden_states: bool = False) -> Context:
    """The context of whole sequences: causal, and padded keys are never seen.

    Args:
      config: of the decoder.
      real: `[b, t]` bool, True for real tokens, padding left or right.
      hidden_states: whether blocks return the residual stream.
    """
    t = real.shape[1]
    place = jnp.arange(t)
    return seen_from(config, positions(real), place, place, real, hidden_states)


def seen_from(
    config: ModelConfig, position: jax.Array, query: jax.Array, key: jax.Array, real: jax.Array,
    hidden_states: bool = False,
) -> Context:
    """The context of queries at places `query: [t]` that look at keys at places `key: [s]`.

        full: key <= query;   local: also key > query - window

    Args:
      config: of the decoder.
      position: `[b, t]` int32, for the rotary angles; it may differ from the place by padding.
      query, key: int32 places in the sequence or the cache.
      real: `[b, s]` bool, which keys hold real tokens.
      hidden_states: whether blocks return the residual stream.
    """
    behind = query[:, None] - key[None, :]
    allowed = (behind >= 0)[None, None] & real[:, None, None, :]
    full = View(*angles(position, frequencies(config)), allowed)
    if not any(config.local_layers):
        return Context(full, None, hidden_states)
    near = allowed & (behind < config.window)[None, None]
    return Context(full, View(*angles(position, local_frequencies(config)), near), hidden_states)


def local_layers(config: ModelConfig) -> np.ndarray:
    """Which layers have the sliding window, bool `[l]`."""
    return np.asarray(config.local_layers or (False,) * config.n_layers)


def positions(real: jax.Array) -> jax.Array:
    """Number of real tokens before each one, `[b, t]` int32; 0 at padding on the left."""
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)


def frequencies(config: ModelConfig) -> jax.Array:
    """Rotary frequencies `w_j = theta^(-2j / h)`, `[h / 2]` float32, stretched by rope_scaling.

    Source: Su et al., RoFormer, arXiv 2104.09864; `llama3` as in the Llama 3.1 release.
    """
    w = _powers(config.rope_theta, config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return w
    if scaling.rope_type == "linear":
        return w / scaling.factor
    turns = scaling.original_max_position * w / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - blend) * w / scaling.factor + blend * w


def local_frequencies(config: ModelConfig) -> jax.Array:
    """Rotary frequencies `[h / 2]` of local layers: their own base, unstretched, if there is one.

    Source: Gemma 3 technical report, arXiv 2503.19786, section 2.
    """
    if config.local_rope_theta is None:
        return frequencies(config)
    return _powers(config.local_rope_theta, config.head_dim)


def _powers(theta: float, head_dim: int) -> jax.Array:
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / theta**exponent


def angles(positions: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, `[b, t, 1, h / 2]` float32, of `position * w_j`.

    Args:
      positions: `[b, t]`.
      w: `[h / 2]` frequencies.
    """
    phase = positions.astype(jnp.float32)[..., None, None] * w[None, None, None]
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, view: View) -> jax.Array:
    """Rotates the pairs `(x_j, x_{j + h/2})` of `x: [b, t, n, h]` by the angles of the view.

    This is the half-rotation layout of Hugging Face checkpoints, so their weights load unpermuted.
    """
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = view.cos, view.sin
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x.dtype)
