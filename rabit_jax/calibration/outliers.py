"""How finely integer kernels must resolve the activations of each packed matrix."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32
from rabit_jax.tree import is_weight, map_leaves
from rabit_jax.types import Array, Param, Params, Weight
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.scaled_weight import ScaledWeight
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.sum_weight import SumWeight

# Two limbs leave a relative error of `top / rms / (2^15 sqrt(12))`. Where a channel's root mean
# square is 25 times that of all, a token 4 times larger than it makes that 1e-3.
LARGEST_RATIO = 25.0


def outlier_ratio(s_in: Float[Array, "*l i"], h: Float[Array, "*l k i"]) -> float:
    """`max_i u_i / sqrt(mean_i u_i^2)` with `u = s_in h`, the largest over layers and paths.

    `s_in: [..., i]` root mean square of each input channel, `h: [..., k, i]` input scales. 1 where
    all channels are alike, `sqrt(i)` where one has everything.
    """
    u = s_in[..., None, :].astype(F32) * jnp.abs(h.astype(F32))
    rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=-1))
    return float(jnp.max(jnp.max(u, axis=-1) / jnp.maximum(rms, jnp.finfo(F32).tiny)))


def record_limbs(packed: Params, stats: Mapping[str, Stats]) -> Params:
    """The tree with `limbs` set in each `PackedSign` whose statistics are given, in sums too.

    3 bytes of fixed point where `outlier_ratio` passes 25, else 2. The packed file keeps the
    choice, so that whoever runs the model needs no calibration text.

    Args:
      packed: a packed params tree.
      stats: from `calibrate`, by path.

    Example:
      >>> packed = record_limbs(pack(student), stats)
    """

    def choose(path: str, leaf: Param) -> Param:
        return _chosen(leaf, stats[path].s_in) if path in stats and is_weight(leaf) else leaf

    return map_leaves(choose, packed)


def _chosen(node: Weight, s_in: Float[Array, "... i"]) -> Weight:
    """The node with `limbs` set, or those of its parts."""
    if isinstance(node, SumWeight):
        return SumWeight(tuple(_chosen(term, s_in) for term in node.terms))
    if isinstance(node, ScaledWeight):
        return node.replace(inner=_chosen(node.inner, s_in * node.d_in.astype(F32)))
    if isinstance(node, Reshaped):
        return node.replace(matrix=_chosen(node.matrix, s_in))
    if not isinstance(node, PackedSign):
        return node
    return node.replace(limbs=3 if outlier_ratio(s_in, node.h) > LARGEST_RATIO else 2)
