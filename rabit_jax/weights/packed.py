"""`PackedSign`: the deployed form, one bit per sign and 16-bit scales."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rabit_jax.errors import BadInput
from rabit_jax.weights.ste import F32, outer

SCALE_DTYPE = jnp.float16


@struct.dataclass
class PackedSign:
    """`W_hat = sum_i diag(h_i) B_i diag(g_i)` with `B_i` packed in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`.
      g: float16 `[..., k, o]`.
      h: float16 `[..., k, i]`.
    """

    bits: jax.Array
    g: jax.Array
    h: jax.Array

    @property
    def k(self) -> int:
        """Number of sign paths."""
        return self.g.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.g.shape[:-2], self.h.shape[-1], self.g.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat`."""
        from kernels.reference import packed_matmul

        return packed_matmul(x, self.bits, self.g, self.h)

    def positive(self) -> jax.Array:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        from kernels.layout import unpack_bits

        return jnp.swapaxes(unpack_bits(self.bits, self.shape[-2]), -1, -2).astype(bool)

    def signs(self) -> jax.Array:
        """Signs as int8 `[..., k, i, o]`, each -1 or +1."""
        return plus_minus(self.positive())

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs = self.signs()
        for i in range(self.k):
            scales = outer(self.h[..., i, :].astype(F32), self.g[..., i, :].astype(F32))
            yield signs[..., i, :, :] * scales

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return sum(self.paths())

    def roles(self) -> PackedSign:
        """Leaf names for the mesh."""
        return PackedSign(bits="sign", g="scale", h="scale")

    def pack(self, name: str) -> PackedSign:
        """Itself: already packed."""
        return self

    def bits_per_weight(self) -> float:
        """Nominal `k + 16 k (i + o) / (i o)`; padding on disk comes on top where 256 does not
        divide i."""
        return nominal_bits(self.shape, self.k)

    def deployed_bytes(self) -> int:
        """Bytes of all leaves: what the packed file stores."""
        return sum(
            leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in (self.bits, self.g, self.h)
        )


def plus_minus(positive: jax.Array) -> jax.Array:
    """Bool, True for +1 -> int8, each -1 or +1."""
    return positive.astype(jnp.int8) * 2 - 1


def nominal_bits(shape: tuple[int, ...], k: int) -> float:
    """Bits per weight of k packed paths of `[..., i, o]`: `k + 16 k (i + o) / (i o)`."""
    i, o = shape[-2:]
    return k + 16 * k * (i + o) / (i * o)


def packed_size(shape: tuple[int, ...], k: int) -> int:
    """Bytes of k packed paths of `[..., i, o]`, padding of the inputs to 256 included."""
    from kernels.layout import packed_bytes

    *lead, i, o = shape
    return prod(lead) * k * (o * packed_bytes(i) + 2 * (i + o))


def balance(g: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Give each pair equal geometric means, `g_i / c` and `h_i c`; `h_i g_i^T` is unchanged.

    The 16-bit range then serves both factors equally. `g: [..., k, o]`, `h: [..., k, i]` float32.
    """
    log_mean = [jnp.mean(jnp.log(jnp.abs(s)), axis=-1, keepdims=True) for s in (g, h)]
    c = jnp.exp((log_mean[0] - log_mean[1]) / 2)
    return g / c, h * c


def round_scales(g: jax.Array, h: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """Balance the scales and round them to float16.

    Raises:
      BadInput: a scale is or would become 0, subnormal, infinite or NaN; the message names the
        layer and the scale.
    """
    _check_scales(g, h, name, float(np.finfo(np.float32).tiny))
    g, h = (s.astype(SCALE_DTYPE) for s in balance(g, h))
    _check_scales(g, h, name, float(np.finfo(np.float16).tiny))
    return g, h


def _check_scales(g: jax.Array, h: jax.Array, name: str, smallest: float) -> None:
    for label, scale in (("g", g), ("h", h)):
        values = np.asarray(scale, np.float32)
        bad = np.argwhere(~((np.abs(values) >= smallest) & np.isfinite(values)))
        if len(bad):
            raise BadInput(
                f"{name}: scale {label}{bad[0].tolist()} becomes {values[tuple(bad[0])]:.3g} in "
                f"float16 ({len(bad)} of {values.size} leave the normal range 6.1e-05 to 65504): "
                "keep scales positive while training, or initialise this layer again"
            )
