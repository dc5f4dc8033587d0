"""Path freezing: every path but the last has fixed signs (arXiv 2505.22811)."""

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
    outer,
    path_slope,
    scale_gradients,
    ste_names,
    summed,
    with_sign,
)
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.independent_sign import residuals
from rabit_jax.weights.leaves import choice, leaf
from rabit_jax.weights.sign_paths import PackedSign, SignFit, SignPaths, pack_positive, round_scales


@dataclass(frozen=True)
class FrozenPathSpec(SignFit):
    """Path freezing (MBOK, arXiv 2505.22811), from the same start as `ResidualSignSpec`.

    Its authors start from greedy SVID: `rounds=0, a_in=0, a_out=0`. The settings are those of
    `SignFit`; the latent is what the fit leaves to the last path.

    Example:
      >>> node = FrozenPathSpec(k=2, rounds=0, a_in=0.0, a_out=0.0).init(w)      # w: [..., i, o]
    """

    type: Literal["frozen_path"] = field(default="frozen_path", kw_only=True)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> FrozenPath:
        """Kernel `[..., i, o]` -> `FrozenPath`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: unused, nothing is random here.
        """
        g, h = self.scales(w, stats)
        found = residuals(w, g, h)
        return FrozenPath(found[..., :-1, :, :] >= 0, found[..., -1, :, :], g, h, self.ste)

    def dense(self, node: FrozenPath) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@pytree_dataclass
class FrozenPath(SignPaths):
    """`W_hat = sum_{i<k} diag(h_i) B_i diag(g_i) + diag(h_k) sign(V) diag(g_k)`, `B_i` constant.

    What is left of `ResidualSign` when the earlier paths may no longer change their signs: the
    last path corrects an error that only the scales still move.

    Attributes:
      frozen: bool `[..., k - 1, i, o]`, the fixed signs, True for +1; no training changes them.
      latent: `V`, float32 or bfloat16 `[..., i, o]`.
      g: float32 `[..., k, o]` output scales ("row scale").
      h: float32 `[..., k, i]` input scales ("column scale").
      ste: straight-through rule of the latent, see `ste.path_slope`.
    """

    frozen: Array = leaf("sign", "k-1 i o")
    latent: Array = leaf("latent", "i o")
    g: Array = leaf("scale", "k o")
    h: Array = leaf("scale", "k i")
    ste: str = choice("identity", ste_names)

    packed = PackedSign

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return frozen_weight(self.frozen, self.latent, self.g, self.h, self.ste)

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return jnp.stack(list(_positive(self.frozen, self.latent)), axis=-3)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return _terms(self.frozen, self.latent, self.g, self.h)

    def pack(self, name: str) -> PackedSign:
        """Pack the signs, and round the balanced scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        g, h = round_scales(name, g=self.g, h=self.h)
        return PackedSign(pack_positive(self.positive()), g, h)

    def rescaled(self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]) -> FrozenPath:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        latent = (self.latent.astype(F32) * outer(d_in, d_out)).astype(self.latent.dtype)
        return self.replace(
            latent=latent, g=self.g * d_out[..., None, :], h=self.h * d_in[..., None, :]
        )


def _positive(frozen: jax.Array, latent: jax.Array) -> Iterator[jax.Array]:
    yield from (frozen[..., i, :, :] for i in range(frozen.shape[-3]))
    yield latent >= 0


def _terms(frozen: jax.Array, latent: jax.Array, g: jax.Array, h: jax.Array) -> Iterator[jax.Array]:
    for i, positive in enumerate(_positive(frozen, latent)):
        yield with_sign(outer(h[..., i, :], g[..., i, :]), positive)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def frozen_weight(
    frozen: Bool[Array, "... k-1 i o"],
    latent: Float[Array, "... i o"],
    g: Float[Array, "... k o"],
    h: Float[Array, "... k i"],
    ste: str = "identity",
    dtype=F32,
) -> Float[Array, "... i o"]:
    """`W_hat` of `FrozenPath`, summed path by path, sign(0) = +1.

    Backward, with `G = dL/dW_hat` and all `B_i` constant for the scales:

        dL/dV = s * G                    s by `ste.path_slope` at V and h_k g_k^T
        dL/dg_i[o] = sum_in G B_i h_i;   dL/dh_i[in] = sum_out G B_i g_i

    Args:
      frozen: bool `[..., k - 1, i, o]`.
      latent: `[..., i, o]` float32 or bfloat16.
      g: `[..., k, o]` float32.
      h: `[..., k, i]` float32.
      ste: one of `ste.STE`.
      dtype: dtype of the result; sums are taken in float32 and rounded once.

    Returns:
      `[..., i, o]` in `dtype`.
    """
    check_choice("ste", ste, ste_names())
    return summed(_terms(frozen, latent, g, h)).astype(dtype)


def _forward(frozen, latent, g, h, ste, dtype):
    return frozen_weight(frozen, latent, g, h, ste, dtype), (frozen, latent, g, h)


def _backward(ste, dtype, residuals, cotangent):
    frozen, latent, g, h = residuals
    cotangent = cotangent.astype(F32)
    slope = path_slope(latent, outer(h[..., -1, :], g[..., -1, :]), ste)
    dg, dh = scale_gradients(cotangent, _positive(frozen, latent), g, h)
    return None, (cotangent * slope).astype(latent.dtype), dg, dh

frozen_weight.defvjp(_forward, _backward)
