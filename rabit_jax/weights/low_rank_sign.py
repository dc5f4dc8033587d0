"""LittleBit: a product of two sign factors between scales, 0.1 to 1 bit per weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import floor, prod
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput, check_choice
from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.iterative_svid import floored, rank1
from rabit_jax.signs.ste import F32, outer
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import WeightNode, choice, leaf
from rabit_jax.weights.product import product
from rabit_jax.weights.seam import times
from rabit_jax.weights.sign_paths import pack_positive, plus_minus, round_scales

STEP = 8
TOLERANCE = 1e-5
FLOOR_RANK = 1e-6  # of the largest rank scale; float16 spans 1e9


@dataclass(frozen=True)
class LowRankSignSpec:
    """LittleBit with its Dual-SVID start (arXiv 2506.13771).

    Attributes:
      bits: bits per weight, scales counted, from which each kernel's rank follows by
        `rank_for_bits`; the smallest rank, 8, takes more than that on small kernels.
      rank: rank of the factors of every kernel instead; 0 takes it from `bits`.
      twin: whether a second copy is fitted to what the first leaves; both share the bits.
      ste: "smooth", "clipped" or "identity", the straight-through rule of `factor_sign`.

    Example:
      >>> node = LowRankSignSpec(bits=0.1).init(w)      # w: [..., 4096, 11008]
      >>> node.u.shape                                  # [..., c, i, r]
      (2, 4096, 128)
    """

    bits: float = 1.0
    rank: int = 0
    twin: bool = True
    ste: FactorSte = "smooth"
    type: Literal["low_rank"] = field(default="low_rank", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if not 0 < self.bits < float("inf"):
            raise BadInput(f"bits is {self.bits}: bits per weight must be positive")
        if self.rank < 0:
            raise BadInput(f"rank is {self.rank}: it must be positive, or 0 to follow from bits")
        check_choice("ste", self.ste, FACTOR_STE)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> LowRankSign:
        """Kernel `[..., i, o]` -> `LowRankSign`, fitted layer by layer.

        Scales are kept at 1% of their mean, see `floored`.

        Args:
          w: float `[..., i, o]`.
          stats: unused, the start fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node with float32 latents.

        Raises:
          BadInput: `rank` exceeds a side of the matrix.
        """
        return self.fit(w).floored()

    def fit(self, w: Float[Array, "... i o"]) -> LowRankSign:
        """`init` before scales are floored, which is done in the space where they are stored."""
        i, o = w.shape[-2:]
        copies = 2 if self.twin else 1
        rank = self.rank or rank_for_bits(i, o, self.bits, copies)
        if rank > min(i, o):
            raise BadInput(f"rank is {rank}: a matrix [{i}, {o}] has no more than {min(i, o)}")
        return LowRankSign(*fit_factors(w, rank, copies), ste=self.ste)

    def dense(self, node: LowRankSign) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


def rank_for_bits(i: int, o: int, bits: float, copies: int) -> int:
    """Rank that `bits` per weight pay for in `copies` sign products of an `[i, o]` matrix.

        r = (i o bits - 16 c (i + o)) / (c (i + o + 16))

    rounded down to a multiple of 8, at least 8, and never above min(i, o).

    Example:
      >>> rank_for_bits(4096, 11008, bits=1.0, copies=2)
      1472
    """
    rank = (i * o * bits - 16 * copies * (i + o)) / (copies * (i + o + 16))
    # The small number keeps the bits of a known rank from rounding to the rank below it.
    return min(max(floor((rank + 1e-6) / STEP) * STEP, STEP), i, o)


@partial(jax.jit, static_argnums=(1, 2))
def fit_factors(
    w: Float[Array, "... i o"], rank: int, copies: int
) -> tuple[Float[Array, ...], ...]:
    """Dual-SVID of `w: [..., i, o]`, and of what is left for each further copy; layer by layer.

    Returns:
      `u: [..., c, i, r]`, `v: [..., c, r, o]`, `h: [..., c, i]`, `l: [..., c, r]`,
      `g: [..., c, o]`, all float32.
    """

    def layer(w):
        rest, found = w.astype(F32), []
        for _ in range(copies):
            found.append(dual_svid(rest, rank))
            u, v, h, l, g = (a[None] for a in found[-1])
            (term,) = low_rank_terms(factor_sign(u), factor_sign(v), h, l, g)
            rest = rest - term
        return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))

    return per_layer(layer, w)


def dual_svid(w: Float[Array, "... i o"], rank: int) -> tuple[Float[Array, ...], ...]:
    """Factors and scales of one matrix from its truncated singular value decomposition.

        W ~ U' V',  U' = U sqrt(S),  V' = sqrt(S) V
        |U'| ~ h l_u^T,  |V'| ~ l_v g^T,  l = l_u l_v

    so that `W_hat = diag(h) sign(U') diag(l) sign(V') diag(g)`. `w: [i, o]` float32.

    Returns:
      `U': [i, r]`, `V': [r, o]`, `h: [i]`, `l: [r]`, `g: [o]` float32; no scale is negative.
    """
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    u, v = u[:, :rank] * root[None, :], root[:, None] * v[:rank]
    l_u, h = _rank1(jnp.abs(u))
    g, l_v = _rank1(jnp.abs(v))
    return u, v, h, _floor(l_u * l_v), g


def _rank1(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rank1(m, jnp.mean(m, axis=1), TOLERANCE)


def _floor(l: jax.Array) -> jax.Array:
    """Keep the scale of a singular value that is 0 within float16."""
    return jnp.maximum(l, FLOOR_RANK * jnp.max(l))


class LowRankProduct(WeightNode):
    """Base of weights with scales `h: [..., c, i]`, `l: [..., c, r]`, `g: [..., c, o]`."""

    @property
    def k(self) -> int:
        """Number of copies: 2 with the residual twin, else 1."""
        return self.sizes()["c"]

    @property
    def rank(self) -> int:
        """Columns of `U`."""
        return self.sizes()["r"]

    def cost(self) -> Cost:
        """Cost per token: `c (i + r + o)` multiplications and `c r (i + o)` additions a layer."""
        *lead, i, o = self.shape
        terms = prod(lead) * self.k
        return Cost(
            terms * (i + self.rank + o), terms * self.rank * (i + o), 0, self.deployed_bytes()
        )


@pytree_dataclass
class PackedLowRank(LowRankProduct):
    """`W_hat = sum_c diag(h_c) sign(U_c) diag(l_c) sign(V_c) diag(g_c)`, signs packed as `rb256`.

    Both factors are packed along their long axis, so that no padding is paid for the rank r; c is
    the number of copies.

    Attributes:
      u_bits: uint8 `[..., c, r, 32 ceil(i / 256)]`, signs of `U^T`.
      v_bits: uint8 `[..., c, r, 32 ceil(o / 256)]`, signs of `V`.
      h: float16 `[..., c, i]`.
      l: float16 `[..., c, r]`.
      g: float16 `[..., c, o]`.
    """

    u_bits: Array = leaf("sign", "c r i/8")
    v_bits: Array = leaf("sign", "c r o/8")
    h: Array = leaf("scale", "c i")
    l: Array = leaf("scale", "c r")
    g: Array = leaf("scale", "c o")

    header_type = "low_rank"
    header_sizes = {"rank": "r", "copies": "c"}

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat`."""
        from rabit_jax.kernels.reference import packed_low_rank_matmul

        return packed_low_rank_matmul(x, self.u_bits, self.v_bits, self.h, self.l, self.g)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """The term of each copy, float32 `[..., i, o]`."""
        signs, i = plus_minus(self.positive()).astype(F32), self.shape[-2]
        u, v = signs[..., :i, :], jnp.swapaxes(signs[..., i:, :], -1, -2)
        scales = (s.astype(F32) for s in (self.h, self.l, self.g))
        return low_rank_terms(u, v, *scales)

    def positive(self) -> Bool[Array, "... c n r"]:
        """Signs of `U` stacked over those of `V^T`, bool `[..., c, i + o, r]`, True for +1."""
        i, o = self.shape[-2:]
        rows = jnp.concatenate([unpack_bits(self.u_bits, i), unpack_bits(self.v_bits, o)], axis=-1)
        return jnp.swapaxes(rows, -1, -2).astype(bool)



def low_rank_terms(
    u: Float[Array, "... c i r"],
    v: Float[Array, "... c r o"],
    h: Float[Array, "... c i"],
    l: Float[Array, "... c r"],
    g: Float[Array, "... c o"],
) -> Iterator[Float[Array, "... i o"]]:
    """`diag(h_c) u_c diag(l_c) v_c diag(g_c)` of each copy, `[..., i, o]` float32.

    `u: [..., c, i, r]`, `v: [..., c, r, o]`, each -1 or +1; `h: [..., c, i]`, `l: [..., c, r]`,
    `g: [..., c, o]`; all float32. The product is taken in full float32 on every device.
    """
    for n in range(l.shape[-2]):
        scaled = u[..., n, :, :] * l[..., n, None, :]
        inner = jnp.matmul(scaled, v[..., n, :, :], precision="highest")
        yield outer(h[..., n, :], g[..., n, :]) * inner


def low_rank_bits(shape: tuple[int, ...], rank: int, copies: int) -> float:
    """Bits per weight of `[..., i, o]`: `c (r (i + o) + 16 (i + o + r)) / (i o)`."""
    i, o = shape[-2:]
    return copies * (rank * (i + o) + 16 * (i + o + rank)) / (i * o)

# What the backward takes sign(U) and sign(V) for, see `factor_sign`.
FactorSte = Literal["smooth", "clipped", "identity"]
FACTOR_STE = get_args(FactorSte)
STEEPNESS = 100.0


@pytree_dataclass
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

    u: Array = leaf("latent", "c i r")
    v: Array = leaf("latent", "c r o")
    h: Array = leaf("scale", "c i")
    l: Array = leaf("scale", "c r")
    g: Array = leaf("scale", "c o")
    ste: str = choice("smooth", lambda: FACTOR_STE)

    packed = PackedLowRank

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat` as `sum_c ((((x * h_c) sign(U_c)) * l_c) sign(V_c)) * g_c`, no `W_hat` built.

        Scales are applied in float32, products taken in `x.dtype`, copies summed in float32.
        """
        u, v = self._factors(x.dtype)
        total = jnp.zeros((), F32)
        for n in range(self.k):
            inner = product(times(x, self.h[n]).astype(x.dtype), u[n])
            inner = product(times(inner, self.l[n]).astype(x.dtype), v[n])
            total += times(inner, self.g[n])
        return total.astype(x.dtype)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """The term of each copy, float32 `[..., i, o]`."""
        u, v = self._factors(F32)
        return low_rank_terms(u, v, self.h, self.l, self.g)

    def _factors(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """`sign(U)`, `sign(V)` in `dtype`, differentiable by the rule `ste`."""
        return factor_sign(self.u, self.ste, dtype), factor_sign(self.v, self.ste, dtype)

    def positive(self) -> Bool[Array, "... c n r"]:
        """Signs of `U` stacked over those of `V^T`, bool `[..., c, i + o, r]`, True for +1."""
        return jnp.concatenate([self.u >= 0, jnp.swapaxes(self.v >= 0, -1, -2)], axis=-2)

    def rescaled(self, d_in: Float[Array, "... i"], d_out: Float[Array, "... o"]) -> LowRankSign:
        """The node of `diag(d_in) W_hat diag(d_out)`; `d_in: [..., i]`, `d_out: [..., o]`."""
        return self.replace(h=self.h * d_in[..., None, :], g=self.g * d_out[..., None, :])

    def floored(self) -> LowRankSign:
        """The node with its scales of inputs and outputs kept at 1% of their mean."""
        return self.replace(h=floored(self.h), g=floored(self.g))

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
def factor_sign(latent: Float[Array, "*n"], ste: str = "smooth", dtype=F32) -> Float[Array, "*n"]:
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
    check_choice("ste", ste, FACTOR_STE)
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
