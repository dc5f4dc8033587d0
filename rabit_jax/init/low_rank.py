"""`LowRankSignSpec`: how a full-precision kernel becomes a `LowRankSign`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import floor
from typing import Literal

import jax
import jax.numpy as jnp

from rabit_jax.errors import BadInput
from rabit_jax.init.importance import Stats
from rabit_jax.init.svid import SMALLEST, rank1
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.low_rank import FACTOR_STE, FactorSte, LowRankSign, factor_sign
from rabit_jax.weights.packed_low_rank import low_rank_terms
from rabit_jax.weights.ste import F32

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
        if self.ste not in FACTOR_STE:
            raise BadInput(f"ste is {self.ste!r}: choose smooth, clipped or identity")

    def init(
        self, w: jax.Array, stats: Stats | None = None, key: jax.Array | None = None
    ) -> LowRankSign:
        """Kernel `[..., i, o]` -> `LowRankSign`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: unused, the start fits the plain squared error.
          key: unused, nothing is random here.

        Returns:
          A node with float32 latents.

        Raises:
          BadInput: `rank` exceeds a side of the matrix.
        """
        i, o = w.shape[-2:]
        copies = 2 if self.twin else 1
        rank = self.rank or rank_for_bits(i, o, self.bits, copies)
        if rank > min(i, o):
            raise BadInput(f"rank is {rank}: a matrix [{i}, {o}] has no more than {min(i, o)}")
        return LowRankSign(*fit_factors(w, rank, copies), ste=self.ste)

    def dense(self, node: LowRankSign) -> jax.Array:
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
def fit_factors(w: jax.Array, rank: int, copies: int) -> tuple[jax.Array, ...]:
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


def dual_svid(w: jax.Array, rank: int) -> tuple[jax.Array, ...]:
    """Factors and scales of one matrix from its truncated singular value decomposition.

        W ~ U' V',  U' = U sqrt(S),  V' = sqrt(S) V
        |U'| ~ h l_u^T,  |V'| ~ l_v g^T,  l = l_u l_v

    so that `W_hat = diag(h) sign(U') diag(l) sign(V') diag(g)`. `w: [i, o]` float32.

    Returns:
      `U': [i, r]`, `V': [r, o]`, `h: [i]`, `l: [r]`, `g: [o]` float32; the scales positive.
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
    """Keep the scale of a singular value that is 0, or of a zero matrix, within float16."""
    top = jnp.max(l)
    return jnp.maximum(l, jnp.where(top > SMALLEST, FLOOR_RANK * top, SMALLEST))
