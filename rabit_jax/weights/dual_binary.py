"""`DualBinary`: two binary planes with levels per group (DB-LLM, arXiv 2402.11960)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.groups import group_sum, spread
from rabit_jax.weights.packed import pack_positive
from rabit_jax.weights.packed_groups import GroupedPlanes, PackedDualBinary, to_half
from rabit_jax.weights.ste import F32


@struct.dataclass
class DualBinary(GroupedPlanes):
    """`W_hat = a_1 b_1 + a_2 b_2` with `b` in {0, 1} and `a` per group of inputs and output.

        b_1 = H(w - (a_1 + a_2) / 2),   b_2 = H(-(w - a_1 b_1 - a_2 / 2)),   H(0) = 1

    With `a_1 = 2 s`, `a_2 = -s` the levels are -s, 0, s, 2s and `w` goes to the nearest one.

    Attributes:
      latent: `w`, float32 or bfloat16 `[..., i, o]`, the only large trainable array.
      a: float32 `[..., 2, n, o]` levels of either sign, `n = ceil(i / group)`.
      group: inputs that share levels.

    Example:
      >>> node = DualBinary(w, a=jnp.ones((2, 2, 64)))      # w: [256, 64], two groups of 128
      >>> y = linear(x, node)      # [..., 256] -> [..., 64]
    """

    latent: jax.Array
    a: jax.Array
    group: int = struct.field(pytree_node=False, default=128)

    @property
    def k(self) -> int:
        """Number of binary paths, each a plane of bits."""
        return 2

    planes = k

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return self.latent.shape

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return x @ dual_binary(self.latent, self.a, self.group, x.dtype)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return dual_binary(self.latent, self.a, self.group)

    def paths(self) -> Iterator[jax.Array]:
        """`a_1 b_1` and `a_2 b_2`, float32 `[..., i, o]`."""
        return (term for _, term in _terms(self.latent, self.a, self.group))

    def roles(self) -> DualBinary:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(latent="latent", a="level")

    def pack(self, name: str) -> PackedDualBinary:
        """Derive the planes from the float32 levels, then round the levels to 16 bits.

        Raises:
          BadInput: a level leaves the float16 range; the message begins with `name`.
        """
        a = to_half(self.a, "a", name)
        planes = _derive_planes(self.group, self.latent, self.a)
        return PackedDualBinary(planes, a, self.group, self.shape[-2])


@partial(jax.jit, static_argnums=0)
def _derive_planes(group: int, *leaves: jax.Array) -> jax.Array:
    def layer(latent, a):
        return pack_positive(jnp.stack([on for on, _ in _terms(latent, a, group)]))

    return per_layer(layer, *leaves)


def _terms(latent: jax.Array, a: jax.Array, group: int) -> Iterator[tuple]:
    """`(b_j as bool, a_j b_j)` for j = 1, 2; the one place where the planes are derived."""
    w = latent.astype(F32)
    first, second = (spread(a[..., j, :, :], group, w.shape[-2]) for j in range(2))
    on = w >= (first + second) / 2
    term = jnp.where(on, first, 0)
    yield on, term
    on = w - term <= second / 2
    yield on, jnp.where(on, second, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dual_binary(latent: jax.Array, a: jax.Array, group: int = 128, dtype=F32) -> jax.Array:
    """`W_hat = a_1 b_1 + a_2 b_2` with the planes of `DualBinary`.

    Backward, with `G = dL/dW_hat` and the planes constant:

        dL/dw = G;   dL/da_j = sum_group G b_j

    Args:
      latent: `[..., i, o]` float32 or bfloat16.
      a: `[..., 2, n, o]` float32.
      group: inputs of a group.
      dtype: dtype of the result; the sum is taken in float32 and rounded once.

    Returns:
      `[..., i, o]` in `dtype`.

    Example:
      >>> w = jnp.array([[0.9], [-0.2], [0.4]])
      >>> dual_binary(w, a=jnp.array([[[1.0]], [[-0.5]]])).T
      Array([[1. , 0. , 0.5]], dtype=float32)
    """
    return sum(term for _, term in _terms(latent, a, group)).astype(dtype)


def _forward(latent, a, group, dtype):
    return dual_binary(latent, a, group, dtype), (latent, a)


def _backward(group, dtype, residuals, cotangent):
    latent, a = residuals
    cotangent = cotangent.astype(F32)
    da = [group_sum(jnp.where(on, cotangent, 0), group) for on, _ in _terms(latent, a, group)]
    return cotangent.astype(latent.dtype), jnp.stack(da, axis=-3)


dual_binary.defvjp(_forward, _backward)
