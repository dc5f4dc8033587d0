"""Positions, rotary angles, and which key each query may see.

Axes: b batch, t time, n heads, h head_dim, s keys, l layers.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from rabit_jax.models.config import ModelConfig
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array


@pytree_dataclass
class View:
    """Rotary angles and mask of one kind of layer.

    Attributes:
      cos, sin: of the rotary angles; b may be 1.
      allowed: which key each query may see; b may be 1.
    """

    cos: Float[Array, "b t 1 h/2"]
    sin: Float[Array, "b t 1 h/2"]
    allowed: Bool[Array, "b 1 t s"]


@pytree_dataclass
class Context:
    """What all blocks of one forward pass share.

    Attributes:
      full: the view of layers that see all earlier keys.
      local: the view of layers with a sliding window; None where the model has none.
      hidden_states: whether blocks return the residual stream.
    """

    full: View
    local: View | None = None
    hidden_states: bool = struct.field(pytree_node=False, default=False)

    def view(self, local: Array | bool) -> View:
        """The view of a layer; `local` is a scalar bool, traced or not."""
        if self.local is None:
            return self.full
        if isinstance(local, (bool, np.bool_)):
            return self.local if local else self.full
        return jax.tree.map(lambda a, b: jnp.where(local, a, b), self.local, self.full)


def make_context(
    config: ModelConfig, real: Bool[Array, "b t"], hidden_states: bool = False
) -> Context:
    """The context of whole sequences: causal, and padded keys are never seen.

    Args:
      config: of the decoder.
      real: True for real tokens, padding left or right.
      hidden_states: whether blocks return the residual stream.
    """
    t = real.shape[1]
    place = jnp.arange(t)
    return seen_from(config, positions(real), place, place, real, hidden_states)


def seen_from(
    config: ModelConfig, position: Int[Array, "b t"], query: Int[Array, " t"],
    key: Int[Array, " s"], real: Bool[Array, "b s"], hidden_states: bool = False,
    ring: tuple[Int[Array, " r"], Bool[Array, "b r"]] | None = None,
) -> Context:
    """The context of queries and keys at given places in the sequence or the cache.

        full: key <= query;   local: also key > query - window

    Args:
      config: of the decoder.
      position: of each query, for the rotary angles; it may differ from the place by padding.
      query, key: the places.
      real: which keys hold real tokens.
      hidden_states: whether blocks return the residual stream.
      ring: places of the keys of local layers, and which are real; None takes those of the others.
    """
    behind = query[:, None] - key[None, :]
    allowed = (behind >= 0)[None, None] & real[:, None, None, :]
    full = View(*angles(position, frequencies(config)), allowed)
    if config.window is None or not any(config.local_layers):
        return Context(full, None, hidden_states)
    if ring is not None:
        behind = query[:, None] - ring[0][None, :]
        allowed = (behind >= 0)[None, None] & ring[1][:, None, None, :]
    near = allowed & (behind < config.window)[None, None]
    return Context(full, View(*angles(position, local_frequencies(config)), near), hidden_states)


def local_layers(config: ModelConfig) -> Bool[np.ndarray, " l"]:
    """Which layers have the sliding window."""
    return np.asarray(config.local_layers or (False,) * config.n_layers)


def positions(real: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Number of real tokens before each one; 0 at padding on the left."""
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)


def frequencies(config: ModelConfig) -> Float[Array, " h/2"]:
    """Rotary frequencies `w_j = theta^(-2j / h)`, stretched by rope_scaling.

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


def local_frequencies(config: ModelConfig) -> Float[Array, " h/2"]:
    """Rotary frequencies of local layers: their own base, unstretched, if there is one.

    Source: Gemma 3 technical report, arXiv 2503.19786, section 2.
    """
    if config.local_rope_theta is None:
        return frequencies(config)
    return _powers(config.local_rope_theta, config.head_dim)


def _powers(theta: float, head_dim: int) -> Array:
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / theta**exponent


def angles(
    positions: Int[Array, "b t"], w: Float[Array, " h/2"]
) -> tuple[Float[Array, "b t 1 h/2"], Float[Array, "b t 1 h/2"]]:
    """Cosine and sine of `position * w_j`, for frequencies `w`."""
    phase = positions.astype(jnp.float32)[..., None, None] * w[None, None, None]
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: Float[Array, "b t n h"], view: View) -> Float[Array, "b t n h"]:
    """Rotates the pairs `(x_j, x_{j + h/2})` by the angles of the view.

    This is the half-rotation layout of Hugging Face checkpoints, so their weights load unpermuted.
    """
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = view.cos, view.sin
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x.dtype)
