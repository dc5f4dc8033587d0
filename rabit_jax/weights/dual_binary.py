"""DB-LLM: two {0, 1} planes with levels per group of inputs (arXiv 2402.11960)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats, check_exponents, importance
from rabit_jax.signs.groups import by_group, group_count, group_sum, spread
from rabit_jax.signs.iterative_svid import root_of_unit
from rabit_jax.signs.ste import F32, summed
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.group_levels import GroupedPlanes, to_half, unpack_codes
from rabit_jax.weights.leaves import leaf, size
from rabit_jax.weights.sign_paths import pack_positive

FRACTIONS = 40


@dataclass(frozen=True)
class DualBinarySpec:
    """Start of DB-LLM's flexible dual binarisation (arXiv 2402.11960): levels -s, 0, s, 2s.

    `a_1 = 2 s`, `a_2 = -s`; s is that of `f max|w|`, f = 1/40, 2/40, ..., 1, with the least error
    `sum_group d_in^2 (w - w_hat)^2`, `d_in = importance(s_in, a_in)`; every s belongs to one
    output, so the importance of outputs changes nothing. The latent is the kernel.

    Attributes:
      group: inputs that share levels.
      a_in: exponent of the input importance; 0 ignores it.

    Example:
      >>> node = DualBinarySpec(group=128).init(w)      # w: [..., i, o]
      >>> node.a.shape                                  # [..., 2, ceil(i / 128), o]
    """

    group: int = 128
    a_in: float = 0.5
    type: Literal["dual_binary"] = field(default="dual_binary", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if self.group < 1:
            raise BadInput(f"group is {self.group}: a group must hold at least 1 input")
        check_exponents(self.a_in)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> DualBinary:
        """Kernel `[..., i, o]` -> `DualBinary`, searched layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None takes the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node whose latent is a float32 copy of `w`.
        """
        s = _search(self, w, None if stats is None else stats.s_in)
        return DualBinary(jnp.array(w, F32, copy=True), _levels(s), self.group)

    def dense(self, node: DualBinary) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def _levels(s: jax.Array) -> jax.Array:
    """`(2 s, -s)`: `[..., n, o]` -> `[..., 2, n, o]`."""
    return jnp.stack([2 * s, -s], axis=-3)


@partial(jax.jit, static_argnums=0)
def _search(spec: DualBinarySpec, w: jax.Array, s_in: jax.Array | None) -> jax.Array:
    """The best s of the grid, float32 `[..., n, o]`."""

    def layer(w, d_in):
        root = root_of_unit(w)
        w, weight = w.astype(F32) / root / root, jnp.square(d_in)[:, None]
        largest = by_group(jnp.abs(w), spec.group).max(axis=-2)

        def attempt(best, fraction):
            s = fraction * largest
            missed = jnp.square(w - dual_binary(w, _levels(s), spec.group))
            error = group_sum(weight * missed, spec.group)
            better = error < best[0]
            return (jnp.where(better, error, best[0]), jnp.where(better, s, best[1])), None

        shape = (group_count(w.shape[0], spec.group), w.shape[1])
        start = jnp.full(shape, jnp.inf, F32), jnp.zeros(shape, F32)
        fractions = jnp.arange(1, FRACTIONS + 1, dtype=F32) / FRACTIONS
        return jax.lax.scan(attempt, start, fractions)[0][1] * root * root

    d_in = jnp.ones(w.shape[:-1]) if s_in is None else importance(s_in, spec.a_in)
    return per_layer(layer, w, d_in)


class TwoPlanes(GroupedPlanes):
    """Base of the trained and the packed form: two binary paths, each a plane of bits."""

    @property
    def k(self) -> int:
        """Number of binary paths."""
        return 2

    planes = k


@pytree_dataclass
class PackedDualBinary(TwoPlanes):
    """`W_hat = a_1 b_1 + a_2 b_2` with `b` in {0, 1} as bit planes in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., 2, o, 32 ceil(i / 256)]`.
      a: float16 `[..., 2, n, o]` levels, `n = ceil(i / group)`.
      group: inputs that share levels.
      inputs: `i`.
    """

    bits: Array = leaf("code", "2 o i/8")
    a: Array = leaf("level", "2 i//group o")
    group: int = size("group")
    inputs: int = size("i")

    header_type = "dual_binary"
    header_sizes = {"group": "group"}

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`a_1 b_1` and `a_2 b_2`, float32 `[..., i, o]`."""
        for j in range(2):
            level = spread(self.a[..., j, :, :].astype(F32), self.group, self.inputs)
            yield level * unpack_codes(self.bits[..., j : j + 1, :, :], self.inputs)


@pytree_dataclass
class DualBinary(TwoPlanes):
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

    latent: Array = leaf("latent", "i o")
    a: Array = leaf("level", "2 i//group o")
    group: int = size("group", default=128)

    packed = PackedDualBinary

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return dual_binary(self.latent, self.a, self.group)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`a_1 b_1` and `a_2 b_2`, float32 `[..., i, o]`."""
        return (term for _, term in _terms(self.latent, self.a, self.group))

    def pack(self, name: str) -> PackedDualBinary:
        """Derive the planes from the float32 levels, then round the levels to 16 bits.

        Raises:
          BadInput: a level leaves the float16 range; the message begins with `name`.
        """
        a = to_half(self.a, "a", name, len(self.lead()))
        planes = _derive_planes(self.group, self.latent, self.a)
        return PackedDualBinary(planes, a, self.group, self.shape[-2])


@partial(jax.jit, static_argnums=0)
def _derive_planes(group: int, *leaves: jax.Array) -> jax.Array:
    def layer(latent, a):
        return pack_positive(jnp.stack([on for on, _ in _terms(latent, a, group)]))

    return per_layer(layer, *leaves)


def _terms(latent: jax.Array, a: jax.Array, group: int) -> Iterator[tuple]:
    """`(b_j as bool, a_j b_j)` for j = 1, 2; the one place where the planes are derived."""
    w, a = latent.astype(F32), a.astype(F32)
    first, second = (spread(a[..., j, :, :], group, w.shape[-2]) for j in range(2))
    on = w >= (first + second) / 2
    term = jnp.where(on, first, 0)
    yield on, term
    on = w - term <= second / 2
    yield on, jnp.where(on, second, 0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dual_binary(
    latent: Float[Array, "... i o"], a: Float[Array, "... 2 n o"], group: int = 128, dtype=F32
) -> Float[Array, "... i o"]:
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
    return summed(term for _, term in _terms(latent, a, group)).astype(dtype)


def _forward(latent, a, group, dtype):
    return dual_binary(latent, a, group, dtype), (latent, a)


def _backward(group, dtype, residuals, cotangent):
    latent, a = residuals
    cotangent = cotangent.astype(F32)
    da = [group_sum(jnp.where(on, cotangent, 0), group) for on, _ in _terms(latent, a, group)]
    return cotangent.astype(latent.dtype), jnp.stack(da, axis=-3).astype(a.dtype)

dual_binary.defvjp(_forward, _backward)
