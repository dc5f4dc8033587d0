"""One layer of the decoder: attention and gated MLP, for whole sequences and with a cache.

`block` is the only definition of a layer. `Decoder` scans it over its params for training and
evaluation, the decode engine calls it on prepared weights with a key-value cache. `Block` is the
Linen shell that names and initialises the params.

Axes: b batch, t time, d model, n key heads, g query heads of each key head, h head_dim, s keys or
cache slots, f hidden, i in, o out, l layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput
from rabit_jax.kernels.cpu.calls import attention as attend_natively
from rabit_jax.kernels.cpu.calls import attention_fits
from rabit_jax.kernels.cpu.library import library
from rabit_jax.models.cache import Codes, Store, decoded, like
from rabit_jax.models.config import ModelConfig, compute_dtype
from rabit_jax.models.rotary import Context, View, rotate
from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Param, Params, Shape
from rabit_jax.weights.seam import linear
from rabit_jax.weights.shardings import gather_when_used, split_rows

# `x W` in the dtype of x for one matrix: `linear`, or `multiply` of `rabit_jax.models.prepared`.
Multiply: TypeAlias = Callable[[Array, Any], Array]


class Fresh(NamedTuple):
    """The shape of a parameter and how it is initialised."""

    shape: Shape
    init: nn.initializers.Initializer


Declared: TypeAlias = Mapping[str, Any]  # nested, with leaves `Fresh`


class Slots(NamedTuple):
    """The key-value cache of the layers of one kind, and the place in it where one writes next.

    Attributes:
      k, v: `[l, b, n, s, h]`.
      layer: number of the layer among them.
      start: place of the first token that is written.
      ring: whether place p is in slot p modulo s; else it is in slot p.
    """

    k: Store
    v: Store
    layer: int | Array
    start: Array
    ring: bool = False

    def append(self, k: Float[Array, "b n t h"], v: Float[Array, "b n t h"]) -> Slots:
        """`cache[layer, :, :, start : start + t] = new` for keys and values, in place."""
        return self._replace(k=self._written(self.k, k), v=self._written(self.v, v))

    def _written(self, store: Store, new: Float[Array, "b n t h"]) -> Store:
        return jax.tree.map(self._write, store, like(store, new))

    def _write(self, cache: Array, new: Array) -> Array:
        t, slots = new.shape[2], cache.shape[3]
        start = self.start % slots if self.ring else self.start
        if t > 1 and self.ring:
            return cache.at[self.layer, :, :, (start + jnp.arange(t)) % slots].set(
                jnp.moveaxis(new, 2, 0), unique_indices=True)
        return jax.lax.dynamic_update_slice(cache, new[None], (self.layer, 0, 0, start, 0))

    def read(self) -> tuple[Float[Array, "b n s h"], Float[Array, "b n s h"]]:
        """Keys and values of the layer in all slots; codes as float32."""
        def one(store: Store) -> Array:
            found = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False), store)
            return decoded(found) if isinstance(found, Codes) else found

        return one(self.k), one(self.v)


MaybeSlots = TypeVar("MaybeSlots", Slots, None)


def block(
    params: Params, x: Float[Array, "b t d"], view: View, config: ModelConfig,
    slots: MaybeSlots = None, multiply: Multiply = linear,
) -> tuple[Float[Array, "b t d"], MaybeSlots]:
    """One layer.

        x += attention(norm(x));  x += mlp(norm(x))

    With `post_norms` each sum takes `norm(attention(...))` and `norm(mlp(...))` instead.

    Args:
      params: the subtree `layers` of the params without the axis of layers, or that of an engine,
        in which matrices that read the same input may be joined.
      x: in the compute dtype.
      view: angles and mask; with a cache the mask is over its slots.
      config: of the decoder.
      slots: the cache, and where this layer writes; None for whole sequences.
      multiply: how a matrix of `params` multiplies.

    Returns:
      The residual stream after the layer, and the slots with its keys and values written.
    """
    c = config

    def normed(name: str, x: Array) -> Array:
        return rms_norm(x, params[name]["scale"], c)

    with jax.named_scope("block"):
        y, slots = self_attention(
            params["attn"], normed("attn_norm", x), view, c, slots, multiply)
        x = x + (normed("attn_post_norm", y) if c.post_norms else y)
        y = mlp(params["mlp"], normed("mlp_pre_norm" if c.post_norms else "mlp_norm", x), c,
                multiply)
        x = x + (normed("mlp_post_norm", y) if c.post_norms else y)
    return x, slots


def self_attention(
    params: Params, x: Float[Array, "b t d"], view: View, config: ModelConfig,
    slots: MaybeSlots = None, multiply: Multiply = linear,
) -> tuple[Float[Array, "b t d"], MaybeSlots]:
    """`attention(rotate(x W_q), rotate(x W_k), x W_v) W_o`; arguments and results as for `block`.

    With a cache, keys and values of x are written to it first, and all of its slots are read.
    """
    c = config
    with jax.named_scope("attn"):
        q, k, v = (rearrange(y, "b t (n h) -> b t n h", h=c.head_dim)
                   for y in project(params, ("q", "k", "v"), x, c, multiply))
        if c.qk_norm:
            q, k = (rms_norm(a, params[name]["scale"], c)
                    for a, name in ((q, "q_norm"), (k, "k_norm")))
        y, slots = rotary_attention(q, k, v, view, c, slots)
        y = rearrange(y, "b t n h -> b t (n h)")
        return project(params, ("o",), y, c, multiply)[0], slots


def rotary_attention(
    q: Float[Array, "b t ng h"], k: Float[Array, "b t n h"], v: Float[Array, "b t n h"],
    view: View, config: ModelConfig, slots: MaybeSlots = None,
) -> tuple[Float[Array, "b t ng h"], MaybeSlots]:
    """`attention(rotate(q), rotate(k), v)`, over all slots of the cache where there is one."""
    with jax.named_scope("attend"):
        k, v = jnp.swapaxes(rotate(k, view), 1, 2), jnp.swapaxes(v, 1, 2)
        if slots is not None:
            slots = slots.append(k, v)
            if native_attention(q.shape, slots.k):
                return cached_attention(rotate(q, view), slots, view.allowed, config), slots
            k, v = (one.astype(q.dtype) if isinstance(slots.k, Codes) else one
                    for one in slots.read())
        size = config.attention_block
        if slots is None and 0 < size < q.shape[1]:
            return attention_in_blocks(rotate(q, view), k, v, view.allowed, config), slots
        return attention(rotate(q, view), k, v, view.allowed, config), slots


def native_attention(q: Shape, cache: Store) -> bool:
    """Whether the native CPU kernel attends with queries of shape `[b, t, n g, h]` to a cache."""
    return (jax.default_backend() == "cpu"
            and (isinstance(cache, Codes) or cache.dtype == jnp.float32)
            and attention_fits(q, cache.shape) and library() is not None)


def cached_attention(
    q: Float[Array, "b 1 ng h"], slots: Slots, allowed: Bool[Array, "#b 1 1 s"],
    config: ModelConfig,
) -> Float[Array, "b 1 ng h"]:
    """`attention` to the cache of one layer where it lies, by the native CPU kernel."""
    k, v = ((one.codes, one.scale) if isinstance(one, Codes) else one for one in slots[:2])
    y = attend_natively(
        q[:, 0].astype(jnp.float32), k, v, jnp.asarray(slots.layer), allowed[:, 0, 0],
        (config.query_scalar or config.head_dim) ** -0.5, config.attention_softcap)
    return y[:, None].astype(q.dtype)


def mlp(
    params: Params, x: Float[Array, "b t d"], config: ModelConfig, multiply: Multiply = linear
) -> Float[Array, "b t d"]:
    """`(act(x W_gate) * (x W_up)) W_down`: SwiGLU, or GeGLU. Source: Shazeer, arXiv 2002.05202."""
    with jax.named_scope("mlp"):
        gate, up = project(params, ("gate", "up"), x, config, multiply)
        gate = nn.silu(gate) if config.activation == "silu" else nn.gelu(gate, approximate=True)
        return project(params, ("down",), gate * up, config, multiply)[0]


def project(
    params: Params, names: Sequence[str], x: Float[Array, "b t i"], config: ModelConfig,
    multiply: Multiply = linear,
) -> list[Array]:
    """`x W (+ bias)` of each named matrix: `[b, t, i]` to `[b, t, o]` each.

    Args:
      params: `{name: {"kernel": ..., "bias": ...}}` of attention or MLP. Matrices that are joined
        along their outputs stand under their names with spaces, such as "q k v".
      names: in the order of the results; all of them read x.
      x: in the compute dtype.
      config: for the number of outputs of each matrix.
      multiply: how a kernel multiplies.
    """
    shapes, found = linear_shapes(config), {}
    joined = {key.split()[0]: key for key in params}
    for key in (joined[name] for name in names if name in joined):
        members = key.split()
        with jax.named_scope("_".join(members)):
            y = multiply(x, params[key]["kernel"])
            if "bias" in params[key]:
                y = y + along_last(params[key]["bias"].astype(y.dtype), y)
            ends = np.cumsum([shapes[member][1] for member in members])
            found |= zip(members, jnp.split(y, ends[:-1], axis=-1), strict=True)
    return [found[name] for name in names]


def attention(
    q: Float[Array, "b t ng h"], k: Float[Array, "b n s h"], v: Float[Array, "b n s h"],
    allowed: Bool[Array, "#b 1 t s"], config: ModelConfig,
) -> Float[Array, "b t ng h"]:
    """`softmax(cap(q k^T / sqrt(c))) v` of grouped queries, scores and softmax in float32.

    `c` is `query_scalar`, or head_dim where the config has none.

    Args:
      q: queries of all heads, those of one key head side by side.
      k, v: in the layout of the cache, and in its dtype.
      allowed: which key each query may see.
      config: for the scale and the soft cap of the scores.

    Returns:
      One vector for each query head, in the dtype of q.
    """
    grouped = rearrange(q, "b t (n g) h -> b n g t h", n=k.shape[1]).astype(k.dtype)
    scores = _products("bngth,bnsh->bngts", grouped, k)
    scores = scores * (config.query_scalar or config.head_dim) ** -0.5
    scores = soft_cap(scores, config.attention_softcap)
    y = weighted(scores, allowed[:, :, None], v)
    return rearrange(y.astype(q.dtype), "b n g t h -> b t (n g) h")


@jax.custom_jvp
def weighted(
    scores: Float[Array, "b n g t s"], allowed: Bool[Array, "#b 1 1 t s"],
    v: Float[Array, "b n s h"],
) -> Float[Array, "b n g t h"]:
    """`softmax(scores) v` over the allowed keys, in float32; products are taken in v's dtype."""
    return _weighted(_share(scores, allowed), v)


def _share(scores: Array, allowed: Array) -> Array:
    # Not -inf: a padded query may see no key at all, and must stay finite.
    return jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)


def _weighted(share: Array, v: Array) -> Array:
    return _products("bngts,bnsh->bngth", share.astype(v.dtype), v)


def _products(equation: str, a: Array, b: Array) -> Array:
    """`einsum` of two arrays of one dtype in float32."""
    # Without the preset, the backward pass would multiply bfloat16 by float32 (as in
    # `jax.nn.dot_product_attention`).
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if b.dtype == jnp.bfloat16 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


@weighted.defjvp
def _weighted_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """`dy = (p ds) v - y sum(p ds) + p dv` with `p = softmax(scores)`.

    The derivative of softmax alone is `p (ds - sum(p ds))`, whose transpose sums rows of the square
    of scores; that of this sums `y dy` over the head's size, as FlashAttention does
    (arXiv 2205.14135, algorithm 4). Keys that are not allowed have `p = 0`, so no mask is needed;
    of a query that may see no key, whose y means nothing, `p` is even.
    """
    (scores, allowed, v), (ds, _, dv) = primals, tangents
    share = _share(scores, allowed)
    y, moved = _weighted(share, v), share * ds
    return y, _weighted(moved, v) - y * jnp.sum(moved, -1, keepdims=True) + _weighted(share, dv)


def attention_in_blocks(
    q: Float[Array, "b t ng h"], k: Float[Array, "b n s h"], v: Float[Array, "b n s h"],
    allowed: Bool[Array, "#b 1 t s"], config: ModelConfig,
) -> Float[Array, "b t ng h"]:
    """`attention`, `attention_block` queries at a time, each against all keys.

    Every softmax is over a whole row of scores, so nothing is approximated. Scores take
    `[b, n, g, attention_block, s]` in the forward and in the backward pass, which makes them again.
    """
    size, length = config.attention_block, q.shape[1]
    pad = -length % size

    def pieces(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, pad if n == axis else 0) for n in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def piece(one: tuple[Array, Array]) -> Array:
        queries, seen = one
        return attention(queries, k, v, seen, config)

    y = jax.lax.map(piece, (pieces(q, 1), pieces(allowed, 2)))
    return jnp.moveaxis(y, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def rms_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], config: ModelConfig
) -> Float[Array, "... d"]:
    """`x / sqrt(mean(x^2) + eps) * scale` in float32, returned in the compute dtype.

    The factor is `1 + scale` where the config has `norm_plus_one`. Source: Zhang and Sennrich,
    Root Mean Square Layer Normalization, arXiv 1910.07467.
    """
    x = x.astype(jnp.float32)
    power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    factor = scale.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)
    y = x * jax.lax.rsqrt(power + config.norm_eps) * along_last(factor, x)
    return y.astype(compute_dtype(config))


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)` elementwise, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def along_last(v: Float[Array, " i"], x: Float[Array, "... i"]) -> Array:
    """`v` with leading axes of one, in the rank of `x`."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def fresh_layer(config: ModelConfig) -> dict[str, Declared]:
    """Shapes and initialisers of the params of one layer, as `block` reads them.

    Kernels start as normal(initializer_range); those of `o` and `down`, which write to the residual
    stream, `sqrt(2 l)` times smaller. Biases start at zero and norms at the factor one.
    """
    c, std = config, config.initializer_range
    small = std / math.sqrt(2 * c.n_layers)
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def matrix(i: int, o: int, bias: bool, std: float) -> Declared:
        kernel = {"kernel": Fresh((i, o), nn.initializers.normal(std))}
        return kernel | ({"bias": Fresh((o,), nn.initializers.zeros)} if bias else {})

    attn = {
        "q": matrix(c.d_model, queries, c.attention_bias, std),
        "k": matrix(c.d_model, keys, c.attention_bias, std),
        "v": matrix(c.d_model, keys, c.attention_bias, std),
        "o": matrix(queries, c.d_model, c.o_bias, small),
    }
    if c.qk_norm:
        attn |= {name: fresh_norm(c, c.head_dim) for name in ("q_norm", "k_norm")}
    mlp = {
        "gate": matrix(c.d_model, c.d_hidden, c.mlp_bias, std),
        "up": matrix(c.d_model, c.d_hidden, c.mlp_bias, std),
        "down": matrix(c.d_hidden, c.d_model, c.mlp_bias, small),
    }
    norms = (("attn_norm", "attn_post_norm", "mlp_pre_norm", "mlp_post_norm") if c.post_norms
             else ("attn_norm", "mlp_norm"))
    return {"attn": attn, "mlp": mlp, **{name: fresh_norm(c, c.d_model) for name in norms}}


def fresh_norm(config: ModelConfig, size: int) -> Declared:
    """Shape and initialiser of the scale of an RMS norm over `size` values."""
    plus_one = config.norm_plus_one
    return {"scale": Fresh((size,), nn.initializers.zeros if plus_one else nn.initializers.ones)}


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs `(i, o)` of each matrix of a layer: `{"q": (d, n g h), ...}`."""
    layer = fresh_layer(config)
    return {name: part["kernel"].shape for side in ("attn", "mlp")
            for name, part in layer[side].items() if "kernel" in part}


class Owner(nn.Module):
    """The Linen owner of some params: declares them at init, later returns what is there.

    `self.param` would open a weight node, which is a box to Flax, and give its dense matrix; after
    initialisation every variable is therefore read as it is.

    Attributes:
      declared: a nested dict of `Fresh`.
    """

    declared: Declared

    @nn.compact
    def __call__(self) -> Params:
        """The params in the structure of `declared`; any of them may be a weight node.

        Raises:
          BadInput: a parameter is missing, or is an array of another shape than the declared one.
        """
        return {name: self._leaf(name, part) if isinstance(part, Fresh)
                else Owner(part, name=name)() for name, part in self.declared.items()}

    def _leaf(self, name: str, fresh: Fresh) -> Param:
        if self.is_initializing():
            self.param(name, fresh.init, fresh.shape)
        leaf, path = self.get_variable("params", name), "/".join((*self.path, name))
        if leaf is None:
            raise BadInput(f"params hold no {path}, the model needs {fresh.shape}")
        if not is_weight(leaf) and tuple(leaf.shape) != fresh.shape:
            raise BadInput(f"parameter {path} is {tuple(leaf.shape)}, the model needs "
                           f"{fresh.shape}")
        return leaf


class Block(nn.Module):
    """Names and initialises the params of one layer and applies `block` to them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], local: Array | bool, context: Context
    ) -> tuple[Array, Array | None]:
        """The residual stream after this layer, and again if hidden states are asked for.

        `local` is a scalar bool, whether the layer has the sliding window.
        """
        params = {name: Owner(part, name=name)()
                  for name, part in fresh_layer(self.config).items()}
        params = gather_when_used({"layers": params})["layers"]
        x, _ = block(params, split_rows(x), context.view(local), self.config)
        x = split_rows(x)
        return x, x if context.hidden_states else None
