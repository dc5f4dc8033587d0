"""The decoder for whole sequences: embedding, scanned blocks, final norm, head.

Axes: b batch, t time, d model, v vocabulary, l layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from rabit_jax.errors import BadInput
from rabit_jax.models.block import (
    Block,
    Declared,
    Fresh,
    Owner,
    fresh_layer,
    fresh_norm,
    rms_norm,
    soft_cap,
)
from rabit_jax.models.config import ModelConfig, compute_dtype
from rabit_jax.models.rotary import local_layers, make_context
from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Params, Shape, Weight
from rabit_jax.weights.leaves import WeightNode
from rabit_jax.weights.product import KEPT, wide_product
from rabit_jax.weights.seam import linear, lookup
from rabit_jax.weights.shardings import gathered, split_rows


class Decoder(nn.Module):
    """A decoder, `logits = head(norm(blocks(embed(tokens))))`; the config makes the family.

    Its params are a plain dict: `embed/embedding [v, d]`, `layers/attn/{q,k,v,o}/kernel` and
    `layers/mlp/{gate,up,down}/kernel [l, i, o]` (with `bias [l, o]` where the config says so),
    `layers/{attn_norm,mlp_norm}/scale [l, d]` (with `post_norms` `attn_norm`, `attn_post_norm`,
    `mlp_pre_norm`, `mlp_post_norm`), with `qk_norm` `layers/attn/{q_norm,k_norm}/scale [l, h]`,
    `final_norm/scale [d]`, and `head/kernel [d, v]` unless the head is tied. Any kernel may be a
    weight node, those of the layers with a leading layer axis, and the embedding a `Table`.

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
        c, ends = self.config, fresh_ends(self.config)
        self.embed = Owner(ends["embed"])
        kept = KEPT if c.remat_keep == "products" else None
        block = nn.remat(Block, prevent_cse=False, policy=kept) if c.remat else Block
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (typed as one int)
            length=c.n_layers,
        )
        self.layers = scanned(c)
        self.final_norm = Owner(ends["final_norm"])
        # `head` is a method, so the part has another attribute; its params are still `head`.
        self._head = Owner(ends["head"], name="head") if "head" in ends else None

    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None,
        hidden_states: bool = False,
    ) -> Array | tuple[Array, Array | None]:
        """Next-token logits of whole sequences.

        Args:
          tokens: `[b, t]` int ids below v.
          mask: `[b, t]` bool, True for real tokens, padding left or right; None means all real.
            Positions are counted over real tokens, padded keys are never attended to; what comes
            out at padded places is finite and means nothing.
          hidden_states: return the residual stream after each block as well.

        Returns:
          float32 `[b, t, v]`, or that and `[l, b, t, d]` in the compute dtype.

        Raises:
          BadInput: tokens that are no integers `[b, t]` or, where they are not traced, lie outside
            of the vocabulary.
        """
        features, hidden = self.features(tokens, mask, hidden_states)
        logits = self.head(features)
        return (logits, hidden) if hidden_states else logits

    def features(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None,
        hidden_states: bool = False,
    ) -> tuple[Float[Array, "b t d"], Array | None]:
        """What the head reads, after the final norm, and the hidden states or None.

        With `head` this lets a loss project onto the vocabulary in chunks. Arguments as for the
        call; use as `model.apply({"params": params}, tokens, method="features")`.
        """
        check_tokens(tokens, self.config.vocab_size)
        real = jnp.ones((1, tokens.shape[1]), bool) if mask is None else mask.astype(bool)
        context = make_context(self.config, real, hidden_states)
        local = jnp.asarray(local_layers(self.config))
        x, hidden = self.layers(self.embedded(tokens), local, context)
        return self.normed(x), hidden

    def embedded(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What the first block reads."""
        table = gathered("embed/embedding", self.embed()["embedding"])
        return split_rows(embed(table, tokens, self.config))

    def normed(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The final norm of what the last block returns, which the head reads."""
        return split_rows(rms_norm(x, self.final_norm()["scale"], self.config))

    def head(self, features: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Float32 logits."""
        head = self.embed()["embedding"].T if self._head is None else self._head()["kernel"]
        with jax.named_scope("head"):
            y = logits(features.astype(compute_dtype(self.config)), head)
            return soft_cap(y, self.config.final_softcap)


def embed(
    table: Array | Weight, tokens: Int[Array, "b t"], config: ModelConfig
) -> Float[Array, "b t d"]:
    """`embed_scale E[tokens]` in the compute dtype; a token without a row reads NaN.

    `table` is an array `[v, d]` or what `lookup` takes in its place.
    """
    with jax.named_scope("embed"):
        x = lookup(table, tokens).astype(compute_dtype(config))
        # Gemma's factor is rounded to the compute dtype before it multiplies.
        return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, x.dtype)


def check_tokens(tokens: object, vocab_size: int) -> None:
    """Raises BadInput for tokens that are no integers `[b, t]` from 0 to `vocab_size - 1`.

    The values of traced tokens are not known and not checked.
    """
    dtype, shape = getattr(tokens, "dtype", None), tuple(getattr(tokens, "shape", ()))
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 2:
        found = f"{dtype}{list(shape)}" if dtype is not None else f"a {type(tokens).__name__}"
        raise BadInput(f"tokens are {found}, wanted integer ids [b, t]: encode the text with the "
                       "model's tokenizer")
    if isinstance(tokens, Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    values = np.asarray(tokens)  # jnp would trace it where constant tokens meet a traced call
    least, most = values.min(initial=0), values.max(initial=0)
    if least < 0 or most >= vocab_size:
        raise BadInput(f"tokens hold the id {least if least < 0 else most}, the model's vocabulary "
                       f"has 0..{vocab_size - 1}: use the model's own tokenizer")


def logits(x: Float[Array, "... d"], kernel: Array | Weight) -> Float[Array, "... v"]:
    """`x W` accumulated and returned in float32; `W: [d, v]` is an array or a weight node."""
    if is_weight(kernel) and type(kernel).matmul is not WeightNode.matmul:
        return linear(x, kernel).astype(jnp.float32)  # by a kernel of its own, in the dtype of x
    return wide_product(x, kernel.dense() if is_weight(kernel) else cast(Array, kernel))


def fresh_ends(config: ModelConfig) -> dict[str, Declared]:
    """Shapes and initialisers of the params outside the layers, see `fresh_layer`."""
    c, init = config, nn.initializers.normal(config.initializer_range)
    found: dict[str, Declared] = {"embed": {"embedding": Fresh((c.vocab_size, c.d_model), init)},
                                  "final_norm": fresh_norm(c, c.d_model)}
    head = {} if c.tied_head else {"head": {"kernel": Fresh((c.d_model, c.vocab_size), init)}}
    return found | head


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 params: normal(initializer_range), factors of norms one, biases zero.

    The projections into the residual stream, `o` and `down`, start `sqrt(2 l)` times smaller.
    Works under `jit`, with `out_shardings` so that each leaf is created where it will live.
    """
    return unfreeze(Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter of `config`, by path: `{"embed/embedding": (v, d), ...}`."""
    flat = flatten_dict({**fresh_ends(config), "layers": fresh_layer(config)}, sep="/")
    return {path: (config.n_layers, *fresh.shape) if path.startswith("layers/") else fresh.shape
            for path, fresh in sorted(flat.items())}


def check_params(found: Mapping[str, Array | Weight], shapes: Mapping[str, Shape]) -> None:
    """Raises BadInput where params by path do not have the names and shapes of the config."""
    if odd := sorted(set(found) ^ set(shapes)):
        what = "extra" if odd[0] in found else "missing"
        raise BadInput(f"{what} parameter {odd[0]}: the params do not fit the model's config")
    for path, shape in shapes.items():
        if tuple(found[path].shape) != shape:
            raise BadInput(f"parameter {path} is {tuple(found[path].shape)}, the config wants "
                           f"{shape}")


def config_of(model: Decoder | ModelConfig) -> ModelConfig:
    """The config of a decoder, or the config itself.

    Raises:
      BadInput: it is neither.
    """
    config = model.config if isinstance(model, Decoder) else model
    if not isinstance(config, ModelConfig):
        raise BadInput(f"the model is a {type(model).__name__}, wanted a Decoder or its "
                       "ModelConfig")
    return config
