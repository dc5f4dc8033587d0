"""The parts of a Llama block: linear, RMS norm, rotary embedding, attention, SwiGLU.

Every matrix is read from the params tree as it is found there, so an array and any weight node
(see `rabit_jax.weights.linear`) serve alike. Axes: b batch, t time, d model, f hidden, n heads,
h head_dim, s keys.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.weights.linear import is_weight, linear


class Context(struct.PyTreeNode):
    """What every block of one forward pass shares.

    Attributes:
      cos, sin: `[b or 1, t, 1, h / 2]` float32, of the rotary angles.
      allowed: `[b or 1, 1, t, s]` bool, which key each query may see.
      hidden_states: whether blocks return the residual stream.
    """

    cos: jax.Array
    sin: jax.Array
    allowed: jax.Array
    hidden_states: bool = struct.field(pytree_node=False, default=False)


def read_kernel(module: nn.Module, shape: tuple[int, int], std: float) -> Any:
    """The `kernel` of `module`: declared `[i, o]` normal(std) at init, later whatever is there.

    `self.param` would compare leaf shapes and so refuse weight nodes; after initialisation the
    variable is therefore read as it is.

    Raises:
      BadInput: the params hold no such kernel.
    """
    if module.is_initializing():
        module.param("kernel", nn.initializers.normal(std), shape)
    kernel = module.get_variable("params", "kernel")
    if kernel is None:
        raise BadInput(f"params hold no {'/'.join(module.path)}/kernel, the model needs {shape}")
    return kernel


class Linear(nn.Module):
    """`y = x W (+ bias)`: `x: [..., i]` to `[..., o]` in the compute dtype.

    `kernel: [i, o]` array or weight node, started as normal(std); `bias: [o]`, started as zero.
    """

    features: int
    dtype: str
    std: float
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x: [..., i]` to `[..., o]`."""
        kernel = read_kernel(self, (x.shape[-1], self.features), self.std)
        y = linear(x.astype(self.dtype), kernel)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + _align(bias.astype(self.dtype), y)


class Head(nn.Module):
    """Logits `x W` in float32: `x: [..., d]` to `[..., v]`, factors in the compute dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x: [..., d]` to float32 `[..., v]`."""
        config = self.config
        kernel = read_kernel(self, (config.d_model, config.vocab_size), config.initializer_range)
        return logits(x.astype(config.dtype), kernel)


class Embed(nn.Module):
    """The token embedding `E: [v, d]`, looked up by id or, for a tied head, multiplied by."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares the table."""
        init = nn.initializers.normal(self.config.initializer_range)
        self.embedding = self.param("embedding", init, (self.config.vocab_size,
                                                        self.config.d_model))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`tokens: [b, t]` int to `[b, t, d]` in the compute dtype."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x E^T`: `x: [..., d]` to float32 logits `[..., v]`."""
        return logits(x.astype(self.config.dtype), self.embedding.T)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x: [..., d]` to the same shape, in the compute dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.config.norm_eps, self.config.dtype)


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions; softmax in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`x: [b, t, d]` to `[b, t, d]`."""
        c = self.config
        heads = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
        q, k, v = (
            rearrange(self._linear(name, n * c.head_dim)(x), "b t (n h) -> b t n h", n=n)
            for name, n in heads.items()
        )
        q, k = rotate(q, context), rotate(k, context)
        # The library mixes bfloat16 with float32, which strict promotion would refuse.
        with jax.named_scope("attend"), jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, mask=context.allowed)
        std = residual_std(c)
        return self._linear("o", c.d_model, std)(rearrange(y, "b t n h -> b t (n h)"))

    def _linear(self, name: str, features: int, std: float | None = None) -> Linear:
        c = self.config
        return Linear(features, c.dtype, std or c.initializer_range, c.attention_bias, name=name)


class MLP(nn.Module):
    """SwiGLU: `(silu(x W_gate) * (x W_up)) W_down`. Source: Shazeer, arXiv 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x: [b, t, d]` to `[b, t, d]`."""
        c = self.config
        gate, up = (
            Linear(c.d_hidden, c.dtype, c.initializer_range, c.mlp_bias, name=name)(x)
            for name in ("gate", "up")
        )
        down = Linear(c.d_model, c.dtype, residual_std(c), c.mlp_bias, name="down")
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: `x += attention(norm(x)); x += mlp(norm(x))`. The body of the scan."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        """`x: [b, t, d]` after this layer, and again if hidden states are asked for."""
        with jax.named_scope("block"):
            normed = RMSNorm(self.config, name="attn_norm")(x)
            x = x + Attention(self.config, name="attn")(normed, context)
            x = x + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return x, x if context.hidden_states else None


def residual_std(config: ModelConfig) -> float:
    """Standard deviation at the start of `o` and `down`: `initializer_range / sqrt(2 l)`."""
    return config.initializer_range / math.sqrt(2 * config.n_layers)


def logits(x: jax.Array, kernel: Any) -> jax.Array:
    """`x W` accumulated and returned in float32: `x: [..., d]`, `W: [d, v]` array or node."""
    if is_weight(kernel):
        return linear(x, kernel).astype(jnp.float32)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: str) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale`: `x: [..., d]`, `scale: [d]`, in float32, as `dtype`."""
    x = x.astype(jnp.float32)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(power + eps) * _align(scale.astype(jnp.float32), x)
    return y.astype(dtype)


def positions(real: jax.Array) -> jax.Array:
    """Number of real tokens before each one, `[b, t]` int32; 0 at padding on the left."""
    return jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)


def frequencies(config: ModelConfig) -> jax.Array:
    """Rotary frequencies `w_j = theta^(-2j / h)`, `[h / 2]` float32, stretched by rope_scaling.

    Source: Su et al., RoFormer, arXiv 2104.09864; `llama3` as in the Llama 3.1 release.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    w = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return w
    if scaling.rope_type == "linear":
        return w / scaling.factor
    turns = scaling.original_max_position * w / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - blend) * w / scaling.factor + blend * w


def angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, `[b, t, 1, h / 2]` float32, of `position * w_j`; `positions: [b, t]`."""
    phase = positions.astype(jnp.float32)[..., None, None] * frequencies(config)[None, None, None]
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, context: Context) -> jax.Array:
    """Rotates the pairs `(x_j, x_{j + h/2})` of `x: [b, t, n, h]` by the angles of the context.

    This is the half-rotation layout of Hugging Face checkpoints, so their weights load unpermuted.
    """
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = context.cos, context.sin
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x.dtype)


def _align(v: jax.Array, x: jax.Array) -> jax.Array:
    """`v: [i]` with leading axes of one, to the rank of `x: [..., i]`."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)
