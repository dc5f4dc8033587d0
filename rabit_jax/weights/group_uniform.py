"""`GroupUniform`: evenly spaced levels per group of inputs, round-to-nearest made trainable."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.groups import group_sum, spread
from rabit_jax.weights.packed_groups import (
    GroupedPlanes,
    PackedGroupUniform,
    pack_codes,
    to_half,
)
from rabit_jax.weights.ste import F32, with_sign


@struct.dataclass
class GroupUniform(GroupedPlanes):
    """`W_hat = s q + c`, `q = clip(round((W - c) / s), 0, 2^bits - 1)`, s and c per group.

    Attributes:
      latent: `W`, float32 or bfloat16 `[..., i, o]`, the only large trainable array.
      s: float32 `[..., n, o]` step between two levels, `n = ceil(i / group)`.
      c: float32 `[..., n, o]` lowest level.
      group: inputs that share a step and a lowest level.
      bits: bits of a code, 1 to 8.

    Example:
      >>> node = GroupUniform(w, s=jnp.ones((2, 64)), c=jnp.zeros((2, 64)))   # w: [256, 64]
      >>> y = linear(x, node)      # [..., 256] -> [..., 64]
    """

    latent: jax.Array
    s: jax.Array
    c: jax.Array
    group: int = struct.field(pytree_node=False, default=128)
    bits: int = struct.field(pytree_node=False, default=2)

    @property
    def planes(self) -> int:
        """Bit planes that are stored."""
        return self.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.latent.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is computed in float32 and rounded once to `x.dtype`."""
        return x @ group_uniform(self.latent, self.s, self.c, self.group, self.bits, x.dtype)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return group_uniform(self.latent, self.s, self.c, self.group, self.bits)

    def codes(self) -> jax.Array:
        """`q`, uint8 `[..., i, o]`, 0 to `2^bits - 1`."""
        return _codes(self.latent, self.s, self.c, self.group, self.bits).astype(jnp.uint8)

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat` as its only term, float32 `[..., i, o]`."""
        yield self.dense()

    def roles(self) -> GroupUniform:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(latent="latent", s="scale", c="level")

    def pack(self, name: str) -> PackedGroupUniform:
        """Derive the codes from the float32 levels, then round the levels to 16 bits.

        Raises:
          BadInput: `s` or `c` leaves the float16 range; the message begins with `name`.
        """
        s = to_half(self.s, "s", name, scale=True)
        c = to_half(self.c, "c", name)
        planes = _derive_planes(self.group, self.bits, self.latent, self.s, self.c)
        return PackedGroupUniform(planes, s, c, self.group, self.shape[-2])


@partial(jax.jit, static_argnums=(0, 1))
def _derive_planes(group: int, bits: int, *leaves: jax.Array) -> jax.Array:
    def layer(latent, s, c):
        return pack_codes(_codes(latent, s, c, group, bits).astype(jnp.uint8), bits)

    return per_layer(layer, *leaves)


def _split(s: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`c = rest - s whole` with `whole` an integer and `|rest| <= s / 2`: `(whole, rest, 1 / s)`.

    Rounding `(W - rest) / s` and adding `whole` is rounding `(W - c) / s`, but for the weights that
    lie exactly between two levels: these go to the even multiple of `s`, as round-to-nearest with
    an integer zero point sends them, instead of to the even code. `with_sign` keeps the product
    from being fused with the sum, so that `rest` is exactly 0 where `c = -s whole`. The reciprocal
    is written out since a compiler may or may not divide by multiplying with it, and two forms of
    one division would disagree about weights that lie almost between two levels.
    """
    inverse = 1 / s
    whole = jnp.round(-c * inverse)
    return whole, c + with_sign(s * jnp.abs(whole), whole >= 0), inverse


def _codes(latent: jax.Array, s: jax.Array, c: jax.Array, group: int, bits: int) -> jax.Array:
    """`q`, float32 `[..., i, o]`; the one place where codes are derived."""
    whole, rest, inverse = (spread(v, group, latent.shape[-2]) for v in _split(s, c))
    return jnp.clip(jnp.round((latent.astype(F32) - rest) * inverse) + whole, 0, 2**bits - 1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_uniform(
    latent: jax.Array, s: jax.Array, c: jax.Array, group: int = 128, bits: int = 2, dtype=F32
) -> jax.Array:
    """`W_hat = s q + c` with `q = clip(round((W - c) / s), 0, 2^bits - 1)`.

    Backward, with `G = dL/dW_hat` and the codes constant:

        dL/dW = G;   dL/ds = sum_group G q;   dL/dc = sum_group G

    Args:
      latent: `[..., i, o]` float32 or bfloat16.
      s: `[..., n, o]` float32, positive.
      c: `[..., n, o]` float32.
      group: inputs of a group.
      bits: bits of a code.
      dtype: dtype of the result, which is computed in float32 and rounded once.

    Returns:
      `[..., i, o]` in `dtype`.

    Example:
      >>> w = jnp.array([[0.9], [-0.2]])
      >>> group_uniform(w, s=jnp.array([[0.5]]), c=jnp.array([[-0.5]]))
      Array([[1.],
             [0.]], dtype=float32)
    """
    codes = _codes(latent, s, c, group, bits)
    whole, rest, step = (spread(v, group, latent.shape[-2]) for v in (*_split(s, c)[:2], s))
    return (step * (codes - whole) + rest).astype(dtype)


def _forward(latent, s, c, group, bits, dtype):
    return group_uniform(latent, s, c, group, bits, dtype), (latent, s, c)


def _backward(group, bits, dtype, residuals, cotangent):
    latent, s, c = residuals
    cotangent = cotangent.astype(F32)
    codes = _codes(latent, s, c, group, bits)
    ds, dc = group_sum(cotangent * codes, group), group_sum(cotangent, group)
    return cotangent.astype(latent.dtype), ds, dc


group_uniform.defvjp(_forward, _backward)
