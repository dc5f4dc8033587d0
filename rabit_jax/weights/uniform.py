"""`UniformResidual`: the residual chain with evenly spaced levels, one scale pair for all paths."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.packed import PackedSign
from rabit_jax.weights.paths import SignPaths
from rabit_jax.weights.residual import ResidualSign
from rabit_jax.weights.ste import F32


@struct.dataclass
class UniformResidual(SignPaths):
    """`ResidualSign` with every path's scale half of that before: `a_i = a / 2^(i-1)`.

        W_hat = sum_i 2^(1-i) diag(h) B_i diag(g),  B_i = sign(W - W_hat_1 - ... - W_hat_{i-1})

    For k = 2 the levels are -3a/2, -a/2, a/2, 3a/2: a uniform 2-bit quantiser with a rank-1 scale.
    Beside `ResidualSign` it tells what one shared latent brings from what free scales bring.

    Attributes:
      latent: `W`, float32 or bfloat16 `[..., i, o]`.
      g: float32 `[..., 1, o]` output scale ("row scale") of the first path.
      h: float32 `[..., 1, i]` input scale ("column scale").
      k: number of sign paths.
      ste: straight-through rule of the latent, see `ste.path_slope`.
    """

    latent: jax.Array
    g: jax.Array
    h: jax.Array
    k: int = struct.field(pytree_node=False, default=2)
    ste: str = struct.field(pytree_node=False, default="identity")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.latent.shape

    def free(self) -> ResidualSign:
        """The same weight with a scale pair for every path: `g_i = g / 2^(i-1)`, `h_i = h`."""
        lead = (1,) * (self.g.ndim - 2)
        halves = 0.5 ** jnp.arange(self.k, dtype=F32).reshape(*lead, self.k, 1)
        return ResidualSign(
            self.latent, self.g * halves, jnp.repeat(self.h, self.k, axis=-2), self.ste
        )

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return self.free().matmul(x)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`; gradients as in `ste.effective_weight`."""
        return self.free().dense()

    def positive(self) -> jax.Array:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return self.free().positive()

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return self.free().paths()

    def roles(self) -> UniformResidual:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(latent="latent", g="scale", h="scale")

    def pack(self, name: str) -> PackedSign:
        """As `ResidualSign`: the packed form stores, and is counted with, a pair for each path.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        return self.free().pack(name)

    def rescaled(self, d_in: jax.Array, d_out: jax.Array) -> UniformResidual:
        """The node of `diag(d_in) W_hat diag(d_out)`, `d_in: [..., i]`, `d_out: [..., o]` > 0."""
        node = ResidualSign(self.latent, self.g, self.h).rescaled(d_in, d_out)
        return self.replace(latent=node.latent, g=node.g, h=node.h)
