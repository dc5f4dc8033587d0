"""Evenly spaced levels with one scale for each group of inputs, which other runtimes can store."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int8

from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.signs.groups import by_group, group_count, spread
from rabit_jax.signs.iterative_svid import root_of_unit
from rabit_jax.signs.ste import F32, coupled_signs, effective_weight, ste_names, summed
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.group_levels import storable, to_half
from rabit_jax.weights.leaves import choice, leaf, size
from rabit_jax.weights.sign_paths import SignPaths, pack_positive, plus_minus


def odd_integers(positive: Bool[Array, "... k i o"]) -> Int8[Array, "... i o"]:
    """`m = sum_j 2^(k-1-j) B_j`, j from 0: bool `[..., k, i, o]` -> int8 `[..., i, o]`.

    True stands for +1. An odd integer from `-(2^k - 1)` to `2^k - 1`; `W_hat = 2^(1-k) s m`.
    """
    k = positive.shape[-3]
    return summed(plus_minus(positive[..., n, :, :]) << (k - 1 - n) for n in range(k))


def fit_group_scales(
    fit: Any, w: Float[Array, "i o"], d_in: Float[Array, " i"], d_out: Float[Array, " o"]
) -> Float[Array, "n o"]:
    """`s: [n, o]` of one matrix `w: [i, o]`, by alternating least squares.

        C = sum_j 2^-j B_j of the present s;   s[m, o] = sum_group d_in^2 W C / sum_group d_in^2 C^2

    Both halves lower the weighted error, the signs since they are nearest roundings. Importances of
    outputs cancel, for every scale belongs to one output. Starts from the best scale for k = 1.

    Args:
      fit: with `k`, `group`, `rounds` and `tolerance`.
      w: float `[i, o]`.
      d_in: importance of each input `[i]`.
      d_out: unused.
    """
    root = root_of_unit(w)
    blocks = by_group(w.astype(F32) / root / root, fit.group)
    weight = by_group(d_in[:, None], fit.group) ** 2

    def refit(c):
        return jnp.sum(weight * blocks * c, axis=-2) / jnp.sum(weight * c * c, axis=-2)

    def levels(s):
        positive = coupled_signs(blocks, *_pairs(s, fit.group, fit.k))
        return odd_integers(positive) * 0.5 ** (fit.k - 1)

    def error(s, c):
        return jnp.sum(weight * jnp.square(blocks - s[:, None] * c))

    def step(state):
        count, s, before, _ = state
        c = levels(s)
        s = jnp.maximum(refit(c), 0)
        now = error(s, c)
        return count + 1, s, now, before - now

    def gaining(state):
        count, _, now, gain = state
        return (count < fit.rounds) & ((gain > fit.tolerance * now) | (fit.tolerance == 0))

    start = refit(jnp.where(blocks >= 0, 1.0, -1.0))
    state = (jnp.int32(0), start, error(start, levels(start)), jnp.asarray(jnp.inf, F32))
    return storable(jax.lax.while_loop(gaining, step, state)[1] * root * root)


def _pairs(s: jax.Array, group: int, k: int) -> tuple[jax.Array, jax.Array]:
    """The scales of every group as a matrix of its own: `g: [..., n, k, o]`, `h: [..., n, k,
    group]`, all `h` 1, of `s: [..., n, o]`."""
    g = jnp.stack([s * 0.5**n for n in range(k)], axis=-2)
    return g, jnp.ones((*s.shape[:-1], k, group), F32)


@pytree_dataclass
class PackedUniformSign(SignPaths):
    """`W_hat[i, o] = s[m, o] sum_j 2^-j B_j[i, o]`, j from 0, `m = floor(i / group)`, packed.

    Attributes:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`, `B_j` in the `rb256` layout.
      s: float16 `[..., n, o]`, `n = ceil(i / group)`.
      group: inputs that share a scale.
      inputs: `i`.
    """

    bits: Array = leaf("sign", "k o i/8")
    s: Array = leaf("scale", "i//group o")
    group: int = size("group")
    inputs: int = size("i")

    header_type = "uniform_sign"
    header_sizes = {"k": "k", "group": "group"}

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return jnp.swapaxes(unpack_bits(self.bits, self.inputs), -1, -2).astype(bool)

    def integers(self) -> Int8[Array, "... i o"]:
        """`m`, int8 `[..., i, o]`, odd; `W_hat = 2^(1-k) s m`."""
        return odd_integers(self.positive())

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`, differentiable by the scales."""
        step = self.s.astype(F32) * 0.5 ** (self.k - 1)
        return self.integers() * spread(step, self.group, self.inputs)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs, s = self.signs(), spread(self.s.astype(F32), self.group, self.inputs)
        return (signs[..., n, :, :] * (s * 0.5**n) for n in range(self.k))

    def cost(self) -> Cost:
        """As `UniformSign.cost`."""
        return _cost(self)


@pytree_dataclass
class UniformSign(SignPaths):
    """Evenly spaced levels in training, `W_hat[i, o] = s[m, o] sum_j 2^-j B_j[i, o]`, j from 0.

        B_0 = sign(W);   B_j = sign(W - s (B_0 + ... + 2^(1-j) B_{j-1}))

    For k = 1 the levels are -s and s (binary weights with a scale per group, as Q1_0 of llama.cpp
    stores them), for k = 2 -3s/2, -s/2, s/2 and 3s/2. All are whole multiples of `2^(1-k) s`, so
    integer formats hold them exactly. It takes `k + 16 n / i` bits a weight, n groups.

    Attributes:
      latent: `W`, float32 or bfloat16 `[..., i, o]`.
      s: float32 `[..., n, o]` scale of the first path, `n = ceil(i / group)`.
      group: inputs that share a scale.
      k: number of sign paths.
      ste: straight-through rule of the latent, see `ste.path_slope`.

    Example:
      >>> node = UniformResidualSpec(k=2, group=64).init(w)      # w: [576, 1536]
      >>> node.s.shape
      (9, 1536)
    """

    latent: Array = leaf("latent", "i o")
    s: Array = leaf("scale", "i//group o")
    group: int = size("group", default=128)
    k: int = size("k", default=2)
    ste: str = choice("identity", ste_names)

    packed = PackedUniformSign

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`; gradients as in `ste.effective_weight`."""
        return self._joined(effective_weight(*self._blocks(), ste=self.ste))

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        found = coupled_signs(*self._blocks())
        return self._joined(jnp.moveaxis(found, -3, -4))

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs = plus_minus(self.positive())
        s = spread(self.s.astype(F32), self.group, self.shape[-2])
        return (signs[..., n, :, :] * (s * 0.5**n) for n in range(self.k))

    def pack(self, name: str) -> PackedUniformSign:
        """Derive the bits from the float32 scales, then round the scales to 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        s = to_half(self.s, "s", name, len(self.lead()), scale=True)
        return PackedUniformSign(pack_positive(self.positive()), s, self.group, self.shape[-2])

    def cost(self) -> Cost:
        """Cost per token: `n o` multiplications, n groups, and `k i o` additions a layer; halving
        is not counted."""
        return _cost(self)

    def _blocks(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Latent `[..., n, group, o]` and scales `g`, `h` of the groups."""
        return by_group(self.latent, self.group), *_pairs(self.s, self.group, self.k)

    def _joined(self, blocks: jax.Array) -> jax.Array:
        """`[..., n, group, o]` -> `[..., i, o]`."""
        *lead, n, group, o = blocks.shape
        return blocks.reshape(*lead, n * group, o)[..., : self.shape[-2], :]


def _cost(node: UniformSign | PackedUniformSign) -> Cost:
    *lead, i, o = node.shape
    layers = prod(lead)
    groups = group_count(i, node.group)
    return Cost(layers * groups * o, layers * node.k * i * o, 0, node.deployed_bytes())
