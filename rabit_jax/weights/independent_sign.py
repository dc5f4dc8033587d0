"""Standard quantisation-aware training: one latent for every sign path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax.errors import check_choice
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import (
    F32,
    coupled,
    outer,
    path_slope,
    scale_gradients,
    ste_names,
    summed,
    with_sign,
)
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.leaves import choice, leaf
from rabit_jax.weights.sign_paths import PackedSign, SignFit, SignPaths, pack_positive, round_scales


@dataclass(frozen=True)
class IndependentSignSpec(SignFit):
    """Standard quantisation-aware training from the same start as `ResidualSignSpec`.

    The scales are those of the same fit, see `SignFit` for its settings. Latent i is what the
    coupled forward takes the sign of, `V_1 = W`, `V_i = W - W_hat_1 - ... - W_hat_{i-1}`. So at the
    start signs, scales and `W_hat` are those of the coupled form, and what differs afterwards is
    the coupling alone.

    Example:
      >>> node = IndependentSignSpec(k=2, ste="scaled").init(w)      # w: [..., i, o]
      >>> node.latents.shape                                         # [..., k, i, o]
    """

    type: Literal["independent"] = field(default="independent", kw_only=True)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> IndependentSign:
        """Kernel `[..., i, o]` -> `IndependentSign`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`; sharded arrays stay where they live.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node with float32 latents.
        """
        g, h = self.scales(w, stats)
        return IndependentSign(residuals(w, g, h), g, h, self.ste)

    def dense(self, node: IndependentSign) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@jax.jit
def residuals(
    w: Float[Array, "... i o"], g: Float[Array, "... k o"], h: Float[Array, "... k i"]
) -> Float[Array, "... k i o"]:
    """What each path of the coupled forward takes the sign of: float32 `[..., k, i, o]`."""

    def layer(w, g, h):
        found = [w.astype(F32)]
        for _, term in coupled(w, g, h):
            found.append(found[-1] - term)
        return jnp.stack(found[:-1])

    return per_layer(layer, w, g, h)


@pytree_dataclass
class IndependentSign(SignPaths):
    """`W_hat = sum_i diag(h_i) sign(V_i) diag(g_i)`: what `ResidualSign` is compared with.

    Nothing couples the paths, so they cost k latents, k gradients and k optimiser states.

    Attributes:
      latents: `V`, float32 or bfloat16 `[..., k, i, o]`.
      g: float32 `[..., k, o]` output scales ("row scale").
      h: float32 `[..., k, i]` input scales ("column scale").
      ste: straight-through rule of the latents, see `ste.path_slope`.

    Example:
      >>> node = IndependentSign(jnp.ones((2, 32, 64)), g=jnp.ones((2, 64)), h=jnp.ones((2, 32)))
      >>> y = linear(x, node)      # [..., 32] -> [..., 64]
    """

    latents: Array = leaf("latent", "k i o")
    g: Array = leaf("scale", "k o")
    h: Array = leaf("scale", "k i")
    ste: str = choice("identity", ste_names)

    packed = PackedSign

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return independent_weight(self.latents, self.g, self.h, self.ste)

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return self.latents >= 0

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return _terms(self.latents, self.g, self.h)

    def pack(self, name: str) -> PackedSign:
        """Pack the signs of the latents, and round the balanced scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        g, h = round_scales(name, g=self.g, h=self.h)
        return PackedSign(pack_positive(self.positive()), g, h)

    def rescaled(
        self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]
    ) -> IndependentSign:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        return self.replace(
            latents=self.latents * outer(d_in, d_out)[..., None, :, :],
            g=self.g * d_out[..., None, :],
            h=self.h * d_in[..., None, :],
        )


def _positive(latents: jax.Array) -> Iterator[jax.Array]:
    return (latents[..., i, :, :] >= 0 for i in range(latents.shape[-3]))


def _terms(latents: jax.Array, g: jax.Array, h: jax.Array) -> Iterator[jax.Array]:
    for i, positive in enumerate(_positive(latents)):
        yield with_sign(outer(h[..., i, :], g[..., i, :]), positive)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def independent_weight(
    latents: Float[Array, "... k i o"],
    g: Float[Array, "... k o"],
    h: Float[Array, "... k i"],
    ste: str = "identity",
    dtype=F32,
) -> Float[Array, "... i o"]:
    """`W_hat = sum_i diag(h_i) sign(V_i) diag(g_i)` with sign(0) = +1, summed path by path.

    Backward, with `G = dL/dW_hat`, and `B_i = sign(V_i)` constant for the scales:

        dL/dg_i[o] = sum_in G B_i h_i;   dL/dh_i[in] = sum_out G B_i g_i
        dL/dV_i = s_i * G                s_i by `ste.path_slope` at V_i and h_i g_i^T

    "identity" (s = 1) and "scaled" (s = h_i g_i^T) are both in use, and the choice confounds a
    comparison of methods. The signs are derived again in the backward, so the residuals are the
    inputs and nothing else.

    Args:
      latents: `[..., k, i, o]` float32 or bfloat16.
      g: `[..., k, o]` float32.
      h: `[..., k, i]` float32.
      ste: one of `ste.STE`.
      dtype: dtype of the result; sums are taken in float32 and rounded once.

    Returns:
      `[..., i, o]` in `dtype`.
    """
    check_choice("ste", ste, ste_names())
    return summed(_terms(latents, g, h)).astype(dtype)


def _forward(latents, g, h, ste, dtype):
    return independent_weight(latents, g, h, ste, dtype), (latents, g, h)


def _backward(ste, dtype, residuals, cotangent):
    latents, g, h = residuals
    cotangent = cotangent.astype(F32)
    dg, dh = scale_gradients(cotangent, _positive(latents), g, h)
    step = cotangent[..., None, :, :] * path_slope(latents, outer(h, g), ste)
    return step.astype(latents.dtype), dg, dh

independent_weight.defvjp(_forward, _backward)
