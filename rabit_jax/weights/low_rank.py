"""`LowRankSign`: LittleBit's trainable weight, a product of two sign factors between scales."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.linear import times
from rabit_jax.weights.packed import pack_positive, round_scales
from rabit_jax.weights.packed_low_rank import LowRankProduct, PackedLowRank, low_rank_terms
from rabit_jax.weights.ste import F32

# What the backward takes sign(U) and sign(V) for, see `factor_sign`.
FactorSte = Literal["smooth", "clipped", "identity"]
FACTOR_STE = get_args(FactorSte)
STEEPNESS = 100.0


@struct.dataclass
class LowRankSign(LowRankProduct):
    """`W_hat = sum_c diag(h_c) sign(U_c) diag(l_c) sign(V_c) diag(g_c)` (arXiv 2506.13771).

    The rank r of the factors sets the bits, down to 0.1 per weight. With c = 2 copies the second is
    the residual twin, fitted to what the first leaves and trained with it.

    Attributes:
      u: `U`, float32 or bfloat16 `[..., c, i, r]`.
      v: `V`, float32 or bfloat16 `[..., c, r, o]`.
      h: float32 `[..., c, i]` input scales.
      l: float32 `[..., c, r]` scales of the rank.
      g: float32 `[..., c, o]` output scales.
      ste: the straight-through rule, "smooth", "clipped" or "identity", see `factor_sign`.

    Example:
      >>> node = LowRankSignSpec(bits=0.55).init(w)      # w: [..., 4096, 11008]
      >>> node.rank, node.k
      (800, 2)
    """

    u: jax.Array
    v: jax.Array
    h: jax.Array
    l: jax.Array
    g: jax.Array
    ste: str = struct.field(pytree_node=False, default="smooth")

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat` as `sum_c ((((x * h_c) sign(U_c)) * l_c) sign(V_c)) * g_c`, no `W_hat` built.

        Scales are applied in float32, products taken in `x.dtype`, copies summed in float32.
        """
        u, v = (factor_sign(latent, self.ste, x.dtype) for latent in (self.u, self.v))
        total = 0.0
        for n in range(self.k):
            inner = times(x, self.h[n]).astype(x.dtype) @ u[n]
            total += times(times(inner, self.l[n]).astype(x.dtype) @ v[n], self.g[n])
        return total.astype(x.dtype)

    def paths(self) -> Iterator[jax.Array]:
        """The term of each copy, float32 `[..., i, o]`."""
        u, v = (factor_sign(latent, self.ste) for latent in (self.u, self.v))
        return low_rank_terms(u, v, self.h, self.l, self.g)

    def positive(self) -> jax.Array:
        """Signs of `U` stacked over those of `V^T`, bool `[..., c, i + o, r]`, True for +1."""
        return jnp.concatenate([self.u >= 0, jnp.swapaxes(self.v >= 0, -1, -2)], axis=-2)

    def roles(self) -> LowRankSign:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(u="latent", v="latent", h="scale", l="scale", g="scale")

    def rescaled(self, d_in: jax.Array, d_out: jax.Array) -> LowRankSign:
        """The node of `diag(d_in) W_hat diag(d_out)`; `d_in: [..., i]`, `d_out: [..., o]`."""
        return self.replace(h=self.h * d_in[..., None, :], g=self.g * d_out[..., None, :])

    def pack(self, name: str) -> PackedLowRank:
        """Pack the signs of the latents, and round the balanced scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        return PackedLowRank(
            pack_positive(self.u >= 0),
            pack_positive(jnp.swapaxes(self.v >= 0, -1, -2)),
            *round_scales(name, h=self.h, l=self.l, g=self.g),
        )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def factor_sign(latent: jax.Array, ste: str = "smooth", dtype=F32) -> jax.Array:
    """`sign(V)` with sign(0) = +1 and a straight-through backward.

    Backward, with `G = dL/dsign(V)`:

        dL/dV = 100 (1 - tanh^2(100 V)) * G      for "smooth", as if sign(V) were tanh(100 V)
        dL/dV = G where |V| < 1, else 0          for "clipped"
        dL/dV = G                                for "identity"

    Args:
      latent: `V`, `[...]` float32 or bfloat16.
      ste: "smooth", "clipped" or "identity".
      dtype: dtype of the result.

    Returns:
      `[...]` in `dtype`, each -1 or +1.

    Example:
      >>> factor_sign(jnp.array([-0.3, 0.0]))
      Array([-1.,  1.], dtype=float32)
    """
    return jnp.where(latent >= 0, 1.0, -1.0).astype(dtype)


def _forward(latent, ste, dtype):
    return factor_sign(latent, ste, dtype), latent


def _backward(ste, dtype, latent, cotangent):
    return ((cotangent.astype(F32) * _slope(latent.astype(F32), ste)).astype(latent.dtype),)


def _slope(x: jax.Array, ste: str) -> jax.Array:
    if ste == "smooth":
        return STEEPNESS * (1 - jnp.square(jnp.tanh(STEEPNESS * x)))
    if ste == "clipped":
        return (jnp.abs(x) < 1).astype(F32)
    return jnp.ones_like(x)


factor_sign.defvjp(_forward, _backward)
