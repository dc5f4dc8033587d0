"""Evenly spaced levels per group of inputs: round-to-nearest, as it is or trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.groups import by_group, group_sum, spread
from rabit_jax.signs.ste import F32, with_sign
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.group_levels import (
    GroupedPlanes,
    pack_codes,
    storable,
    to_half,
    unpack_codes,
)
from rabit_jax.weights.leaves import leaf, size


@dataclass(frozen=True)
class GroupUniformSpec:
    """Asymmetric round-to-nearest: at the start `W_hat` is `init.rounding.round_to_nearest` of W.

        s = (max - min) / (2^bits - 1),   c = -s round(-min / s)

    over a group, the range widened to hold 0. The step is kept at what 16 bits can hold, see
    `storable`.

    Attributes:
      bits: bits of a code, 1 to 8.
      group: inputs that share a step and a lowest level; 0 takes all inputs of an output, a row of
        a packed matrix.

    Example:
      >>> node = GroupUniformSpec(bits=2, group=128).init(w)      # w: [..., i, o]
      >>> node.dense().shape == w.shape
      True
    """

    bits: int = 2
    group: int = 128
    type: Literal["round_to_nearest"] = field(default="round_to_nearest", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if not 1 <= self.bits <= 8 or self.group < 0:
            raise BadInput(
                f"bits {self.bits}, group {self.group}: bits must lie in 1..8 and a group must "
                "hold at least 1 input, or be 0 for all of them"
            )

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> GroupUniform:
        """Kernel `[..., i, o]` -> `GroupUniform`, layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: unused, the levels come from the range of the weights alone.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a float32 copy of `w`.
        """
        group = self.group or w.shape[-2]
        s, c = _fit_levels(group, self.bits, w)
        return GroupUniform(jnp.array(w, F32, copy=True), s, c, group, self.bits)

    def dense(self, node: GroupUniform) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@partial(jax.jit, static_argnums=(0, 1))
def _fit_levels(group: int, bits: int, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step and lowest level, each float32 `[..., n, o]`."""

    def layer(w):
        groups = by_group(w.astype(F32), group)
        low = jnp.minimum(groups.min(axis=-2), 0)
        high = jnp.maximum(groups.max(axis=-2), 0)
        s = storable((high - low) / (2**bits - 1))
        return s, -s * jnp.round(-low / jnp.where(s > 0, s, 1))

    return per_layer(layer, w)


@pytree_dataclass
class PackedGroupUniform(GroupedPlanes):
    """`W_hat = s q + c` with the codes `q` as bit planes in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., bits, o, 32 ceil(i / 256)]`, plane p holds bit p of the codes.
      s: float16 `[..., n, o]` steps, `n = ceil(i / group)`.
      c: float16 `[..., n, o]` lowest levels.
      group: inputs that share a step and a lowest level.
      inputs: `i`.
    """

    bits: Array = leaf("code", "b o i/8")
    s: Array = leaf("scale", "i//group o")
    c: Array = leaf("level", "i//group o")
    group: int = size("group")
    inputs: int = size("i")

    header_type = "group_uniform"
    header_sizes = {"bits": "b", "group": "group"}

    def codes(self) -> UInt8[Array, "... i o"]:
        """`q`, uint8 `[..., i, o]`, 0 to `2^bits - 1`."""
        return unpack_codes(self.bits, self.inputs)

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        s, c = (spread(v.astype(F32), self.group, self.inputs) for v in (self.s, self.c))
        return s * self.codes() + c

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat` as its only term, float32 `[..., i, o]`."""
        yield self.dense()


@pytree_dataclass
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

    latent: Array = leaf("latent", "i o")
    s: Array = leaf("scale", "i//group o")
    c: Array = leaf("level", "i//group o")
    group: int = size("group", default=128)
    bits: int = size("b", default=2)

    packed = PackedGroupUniform

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return group_uniform(self.latent, self.s, self.c, self.group, self.bits)

    def codes(self) -> UInt8[Array, "... i o"]:
        """`q`, uint8 `[..., i, o]`, 0 to `2^bits - 1`."""
        return _codes(self.latent, self.s, self.c, self.group, self.bits).astype(jnp.uint8)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat` as its only term, float32 `[..., i, o]`."""
        yield self.dense()

    def pack(self, name: str) -> PackedGroupUniform:
        """Derive the codes from the float32 levels, then round the levels to 16 bits.

        Raises:
          BadInput: `s` or `c` leaves the float16 range; the message begins with `name`.
        """
        lead = len(self.lead())
        s = to_half(self.s, "s", name, lead, scale=True)
        c = to_half(self.c, "c", name, lead)
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
    one division would disagree about weights that lie almost between two levels. A step of 0, of a
    matrix of zeros, has the reciprocal 0, so that all weights are `c`.
    """
    s, c = s.astype(F32), c.astype(F32)
    inverse = jnp.where(s != 0, 1 / jnp.where(s != 0, s, 1), 0)
    whole = jnp.round(-c * inverse)
    return whole, c + with_sign(s * jnp.abs(whole), whole >= 0), inverse


def _codes(latent: jax.Array, s: jax.Array, c: jax.Array, group: int, bits: int) -> jax.Array:
    """`q`, float32 `[..., i, o]`; the one place where codes are derived."""
    whole, rest, inverse = (spread(v, group, latent.shape[-2]) for v in _split(s, c))
    return jnp.clip(jnp.round((latent.astype(F32) - rest) * inverse) + whole, 0, 2**bits - 1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_uniform(
    latent: Float[Array, "... i o"],
    s: Float[Array, "... n o"],
    c: Float[Array, "... n o"],
    group: int = 128,
    bits: int = 2,
    dtype=F32,
) -> Float[Array, "... i o"]:
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
    parts = (*_split(s, c)[:2], s.astype(F32))
    whole, rest, step = (spread(v, group, latent.shape[-2]) for v in parts)
    return (step * (codes - whole) + rest).astype(dtype)


def _forward(latent, s, c, group, bits, dtype):
    return group_uniform(latent, s, c, group, bits, dtype), (latent, s, c)


def _backward(group, bits, dtype, residuals, cotangent):
    latent, s, c = residuals
    cotangent = cotangent.astype(F32)
    codes = _codes(latent, s, c, group, bits)
    ds, dc = group_sum(cotangent * codes, group), group_sum(cotangent, group)
    return cotangent.astype(latent.dtype), ds.astype(s.dtype), dc.astype(c.dtype)

group_uniform.defvjp(_forward, _backward)
