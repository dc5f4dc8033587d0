"""The parts of a block: linear, RMS norm, attention, gated MLP.

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

from rabit_jax.errors import BadInput
from rabit_jax.models.config import ModelConfig
from rabit_jax.models.rotary import Context, View, rotate
from rabit_jax.tree import is_weight
from rabit_jax.weights.seam import linear


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
    """Logits `x W` in float32: `x: [..., d]` to `[..., v]`, factors in the compute dtype.

    The soft cap is left to the caller.
    """

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
        """`tokens: [b, t]` int to `embed_scale E[tokens]`, `[b, t, d]` in the compute dtype."""
        return embed(self.embedding, tokens, self.config)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x E^T`: `x: [..., d]` to float32 logits `[..., v]`."""
        return logits(x.astype(self.config.dtype), self.embedding.T)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32.

    Gemma's multiplies by `1 + scale`. Source: Zhang and Sennrich, Root Mean Square Layer
    Normalization, arXiv 1910.07467.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x: [..., d]` to the same shape, in the compute dtype."""
        start = nn.initializers.zeros if self.config.norm_plus_one else nn.initializers.ones
        return rms_norm(x, self.param("scale", start, (x.shape[-1],)), self.config)


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions; softmax in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, view: View) -> jax.Array:
        """`x: [b, t, d]` to `[b, t, d]`."""
        c = self.config
        heads = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
        q, k, v = (
            rearrange(self._linear(name, n * c.head_dim, c.attention_bias)(x),
                      "b t (n h) -> b t n h", n=n)
            for name, n in heads.items()
        )
        if c.qk_norm:
            q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
        with jax.named_scope("attend"):
            y = attention(rotate(q, view), rotate(k, view), v, view.allowed, c)
        last = self._linear("o", c.d_model, c.o_bias, residual_std(c))
        return last(rearrange(y, "b t n h -> b t (n h)"))

    def _linear(self, name: str, features: int, bias: bool, std: float | None = None) -> Linear:
        c = self.config
        return Linear(features, c.dtype, std or c.initializer_range, bias, name=name)


class MLP(nn.Module):
    """`(act(x W_gate) * (x W_up)) W_down`: SwiGLU, or GeGLU. Source: Shazeer, arXiv 2002.05202."""

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
        return down(activate(gate, c) * up)


class Block(nn.Module):
    """One layer, the body of the scan.

        x += attention(norm(x));  x += mlp(norm(x))

    With `post_norms` what is added goes through a norm of its own before; the one in front of the
    MLP is then `mlp_pre_norm`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, local: jax.Array | bool, context: Context
    ) -> tuple[jax.Array, jax.Array | None]:
        """`x: [b, t, d]` after this layer, and again if hidden states are asked for.

        `local` is a scalar bool, whether the layer has the sliding window.
        """
        c = self.config
        with jax.named_scope("block"):
            y = Attention(c, name="attn")(RMSNorm(c, name="attn_norm")(x), context.view(local))
            x = x + (RMSNorm(c, name="attn_post_norm")(y) if c.post_norms else y)
            y = MLP(c, name="mlp")(RMSNorm(c, name=mlp_norm(c))(x))
            x = x + (RMSNorm(c, name="mlp_post_norm")(y) if c.post_norms else y)
        return x, x if context.hidden_states else None


def mlp_norm(config: ModelConfig) -> str:
    """Name of the norm in front of the MLP."""
    return "mlp_pre_norm" if config.post_norms else "mlp_norm"


def residual_std(config: ModelConfig) -> float:
    """Standard deviation at the start of `o` and `down`: `initializer_range / sqrt(2 l)`."""
    return config.initializer_range / math.sqrt(2 * config.n_layers)


def logits(x: jax.Array, kernel: Any) -> jax.Array:
    """`x W` accumulated and returned in float32: `x: [..., d]`, `W: [d, v]` array or node."""
    if is_weight(kernel):
        return linear(x, kernel).astype(jnp.float32)
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale`: `x: [..., d]`, `scale: [d]`, in float32.

    Comes in the compute dtype; the factor is `1 + scale` where the config says so.
    """
    x = x.astype(jnp.float32)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    factor = scale.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)
    return (x * jax.lax.rsqrt(power + config.norm_eps) * _align(factor, x)).astype(config.dtype)


def embed(table: jax.Array, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """`embed_scale E[tokens]`: `E: [v, d]`, `[b, t]` to `[b, t, d]` in the compute dtype."""
    x = jnp.take(table, tokens, axis=0).astype(config.dtype)
    # Gemma's factor is rounded to the compute dtype before it multiplies.
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, config.dtype)


def activate(x: jax.Array, config: ModelConfig) -> jax.Array:
    """The activation of the MLP's gate."""
    return nn.silu(x) if config.activation == "silu" else nn.gelu(x, approximate=True)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def score_scale(config: ModelConfig) -> float:
    """What scores are multiplied by: `1 / sqrt(query_scalar)`, head_dim where there is none."""
    return (config.query_scalar or config.head_dim) ** -0.5


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, config: ModelConfig
) -> jax.Array:
    """`softmax(cap(q k^T scale)) v` of grouped queries, for training.

    Args:
      q: `[b, t, n g, h]`.
      k, v: `[b, s, n, h]`.
      allowed: `[b or 1, 1, t, s]` bool.
      config: for the scale and the soft cap.

    Returns:
      `[b, t, n g, h]` in the dtype of q; scores and softmax are float32.
    """
    if config.attention_softcap is None:
        # The library mixes bfloat16 with float32, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, mask=allowed, scale=score_scale(config))
    grouped = rearrange(q, "b t (n g) h -> b t n g h", n=k.shape[2])
    scores = jnp.einsum("btngh,bsnh->bngts", grouped, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * score_scale(config), config.attention_softcap)
    scores = jnp.where(allowed[:, :, None], scores, jnp.finfo(jnp.float32).min)
    share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bngts,bsnh->btngh", share, v, preferred_element_type=jnp.float32)
    return rearrange(y.astype(q.dtype), "b t n g h -> b t (n g) h")


def _align(v: jax.Array, x: jax.Array) -> jax.Array:
    """`v: [i]` with leading axes of one, to the rank of `x: [..., i]`."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)
