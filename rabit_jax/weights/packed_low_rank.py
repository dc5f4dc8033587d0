"""`PackedLowRank`: the deployed form of `LowRankSign`, one bit per sign and 16-bit scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.cost import Cost
from rabit_jax.weights.packed import SCALE_DTYPE
from rabit_jax.weights.paths import plus_minus
from rabit_jax.weights.ste import F32, outer


class LowRankProduct:
    """Mixin of weights with scales `h: [..., c, i]`, `l: [..., c, r]`, `g: [..., c, o]`.

    Trained or packed, shapes, sizes and costs are those of the packed form.
    """

    @property
    def k(self) -> int:
        """Number of copies: 2 with the residual twin, else 1."""
        return self.l.shape[-2]

    @property
    def rank(self) -> int:
        """Columns of `U`."""
        return self.l.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.l.shape[:-2], self.h.shape[-1], self.g.shape[-1])

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`, summed path by path."""
        return sum(self.paths())

    def bits_per_weight(self) -> float:
        """Nominal bits per weight once packed, see `low_rank_bits`."""
        return low_rank_bits(self.shape, self.rank, self.k)

    def deployed_bytes(self) -> int:
        """Bytes once packed, padding of inputs and outputs to 256 included."""
        from rabit_jax.kernels.layout import packed_bytes

        *lead, i, o = self.shape
        signs = self.rank * (packed_bytes(i) + packed_bytes(o))
        return prod(lead) * self.k * (signs + 2 * (i + o + self.rank))

    def cost(self) -> Cost:
        """Cost per token: `c (i + r + o)` multiplications and `c r (i + o)` additions a layer."""
        *lead, i, o = self.shape
        terms = prod(lead) * self.k
        return Cost(
            terms * (i + self.rank + o), terms * self.rank * (i + o), 0, self.deployed_bytes()
        )


@struct.dataclass
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

    u_bits: jax.Array
    v_bits: jax.Array
    h: jax.Array
    l: jax.Array
    g: jax.Array

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat`."""
        from rabit_jax.kernels.reference import packed_low_rank_matmul

        return packed_low_rank_matmul(x, self.u_bits, self.v_bits, self.h, self.l, self.g)

    def paths(self) -> Iterator[jax.Array]:
        """The term of each copy, float32 `[..., i, o]`."""
        signs, i = plus_minus(self.positive()).astype(F32), self.shape[-2]
        u, v = signs[..., :i, :], jnp.swapaxes(signs[..., i:, :], -1, -2)
        scales = (s.astype(F32) for s in (self.h, self.l, self.g))
        return low_rank_terms(u, v, *scales)

    def positive(self) -> jax.Array:
        """Signs of `U` stacked over those of `V^T`, bool `[..., c, i + o, r]`, True for +1."""
        from rabit_jax.kernels.layout import unpack_bits

        i, o = self.shape[-2:]
        rows = jnp.concatenate([unpack_bits(self.u_bits, i), unpack_bits(self.v_bits, o)], axis=-1)
        return jnp.swapaxes(rows, -1, -2).astype(bool)

    def roles(self) -> PackedLowRank:
        """Leaf names for the mesh."""
        return PackedLowRank(u_bits="sign", v_bits="sign", h="scale", l="scale", g="scale")

    def pack(self, name: str) -> PackedLowRank:
        """Itself: already packed."""
        return self

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "low_rank", "in", "out", ...}`."""
        i, o = self.shape[-2:]
        return {"type": "low_rank", "in": i, "out": o, "rank": self.rank, "copies": self.k}

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> PackedLowRank:
        """The node of one matrix as shapes and dtypes, from its `header`."""
        from rabit_jax.kernels.layout import packed_bytes

        i, o, r, c = (header[name] for name in ("in", "out", "rank", "copies"))
        bits = [jax.ShapeDtypeStruct((c, r, packed_bytes(n)), jnp.uint8) for n in (i, o)]
        return cls(*bits, *(jax.ShapeDtypeStruct((c, n), SCALE_DTYPE) for n in (i, r, o)))


def low_rank_terms(
    u: jax.Array, v: jax.Array, h: jax.Array, l: jax.Array, g: jax.Array
) -> Iterator[jax.Array]:
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
