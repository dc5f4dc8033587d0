"""RaBiT: one latent from which all sign paths are derived in turn (arXiv 2602.05367)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput, check_choice
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import (
    F32,
    coupled,
    coupled_signs,
    effective_weight,
    live_paths,
    outer,
    ste_names,
)
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.grouped_sign import GroupedSign, grouped
from rabit_jax.weights.leaves import choice, leaf
from rabit_jax.weights.sign_paths import (
    PackedSign,
    SignFit,
    SignPaths,
    round_scales,
    with_layer_k,
)


@dataclass(frozen=True)
class ResidualSignSpec(SignFit):
    """Function-preserving initialisation of RaBiT (arXiv 2602.05367, section 4).

    The latent is the kernel itself; the scales are fitted by iterative residual SVID to
    `diag(s_in^a_in) W diag(s_out^a_out)` and mapped back. k = 1 is OneBit (arXiv 2402.11295).

    Attributes:
      latent_dtype: "float32" or "bfloat16", whose updates are rounded stochastically, see
        `train.optimizer.apply_updates`. Scales are float32 always.
      group: inputs that share the scale of an output; 0 takes all of them, row and column scales.
      The others are those of `SignFit`: k, a_in, a_out, shrinkage, rounds, tolerance, ste.

    Example:
      >>> node = ResidualSignSpec(k=2).init(w)      # w: [..., i, o]
      >>> node.dense().shape == w.shape
      True
    """

    latent_dtype: str = "float32"
    group: int = field(default=0, metadata={"added": True})
    type: Literal["residual"] = field(default="residual", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        super().__post_init__()
        check_choice("latent_dtype", self.latent_dtype, ("float32", "bfloat16"))
        if self.group < 0:
            raise BadInput(f"group is {self.group}: a group must hold at least 1 input, or be 0 "
                           "for all of them")

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> ResidualSign | GroupedSign:
        """Kernel `[..., i, o]` -> `ResidualSign`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`; sharded arrays stay where they live.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a copy of `w` in `latent_dtype`; with a `group` the `GroupedSign`
          of such nodes.
        """
        if self.group:
            own = dataclasses.replace(self, group=0)
            return grouped(own, self.group, w, stats, key)
        latent = jnp.array(w, self.latent_dtype, copy=True)
        return ResidualSign(latent, *self.scales(latent, stats), self.ste)

    def dense(self, node: ResidualSign | GroupedSign) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@pytree_dataclass
class ResidualSign(SignPaths):
    """`W_hat = sum_i diag(h_i) B_i diag(g_i)`, `B_i = sign(W - W_hat_1 - ... - W_hat_{i-1})`.

    Attributes:
      latent: `W`, float32 or bfloat16 `[..., i, o]`, the only large trainable array.
      g: float32 `[..., k, o]` output scales ("row scale").
      h: float32 `[..., k, i]` input scales ("column scale").
      ste: straight-through rule of the latent, see `ste.path_slope`.

    Example:
      >>> node = ResidualSign(latent=w, g=jnp.ones((2, 64)), h=jnp.full((2, 32), 0.1))
      >>> y = linear(x, node)      # [..., 32] -> [..., 64]
    """

    latent: Array = leaf("latent", "i o")
    g: Array = leaf("scale", "k o")
    h: Array = leaf("scale", "k i")
    ste: str = choice("identity", ste_names)

    packed = PackedSign

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return effective_weight(self.latent, self.g, self.h, ste=self.ste)

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1; False in paths that a layer lacks."""
        live = live_paths(self.g, self.h)
        return coupled_signs(self.latent, self.g, self.h) & live[..., None, None]

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return (term for _, term in coupled(self.latent, self.g, self.h))

    def pack(self, name: str) -> PackedSign:
        """Derive the bits from the float32 scales, then round the balanced scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        bits = _derive_bits(self.latent, self.g, self.h)
        g, h = round_scales(name, g=self.g, h=self.h)
        return with_layer_k(PackedSign(bits, g, h))

    def rescaled(self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]) -> ResidualSign:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        latent = (self.latent.astype(F32) * outer(d_in, d_out)).astype(self.latent.dtype)
        return self.replace(
            latent=latent, g=self.g * d_out[..., None, :], h=self.h * d_in[..., None, :]
        )


@jax.jit
def _derive_bits(latent: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
    from rabit_jax.kernels.layout import pack_bits

    def layer(*node):
        return jnp.stack([pack_bits(positive.T) for positive, _ in coupled(*node)])

    return per_layer(layer, latent, g, h)
