"""`ResidualSign`: RaBiT's trainable weight, one latent from which all sign paths are derived."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.packed import PackedSign, round_scales
from rabit_jax.weights.paths import SignPaths
from rabit_jax.weights.ste import F32, coupled, coupled_signs, effective_weight, outer


@struct.dataclass
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

    latent: jax.Array
    g: jax.Array
    h: jax.Array
    ste: str = struct.field(pytree_node=False, default="identity")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.latent.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return x @ effective_weight(self.latent, self.g, self.h, x.dtype, self.ste)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return effective_weight(self.latent, self.g, self.h, ste=self.ste)

    def positive(self) -> jax.Array:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return coupled_signs(self.latent, self.g, self.h)

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return (term for _, term in coupled(self.latent, self.g, self.h))

    def roles(self) -> ResidualSign:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(latent="latent", g="scale", h="scale")

    def pack(self, name: str) -> PackedSign:
        """Derive the bits from the float32 scales, then round the balanced scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        return PackedSign(
            _derive_bits(self.latent, self.g, self.h), *round_scales(name, g=self.g, h=self.h)
        )

    def rescaled(self, d_in: jax.Array, d_out: jax.Array) -> ResidualSign:
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
