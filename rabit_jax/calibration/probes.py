"""Calibration by probes: channel statistics of every kernel from one gradient pass.

A probe replaces a kernel and multiplies like it. Its two extra leaves are zero, and their
"gradients" are the sums of x^2 per input channel and of (dL/dy)^2 per output channel. So one
`jit(grad)` collects the statistics of all layers through scan, remat and any mesh, and the model
need not be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, PyTree

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32
from rabit_jax.tree import Rules, leaves, map_leaves, match_rules, pytree_dataclass
from rabit_jax.types import Array, Batch, Params, Shape, Weight
from rabit_jax.weights.product import product
from rabit_jax.weights.table import is_table

# A gradient that is zero in exact arithmetic, such as that of the KL to the model itself, has a
# root mean square of about 1e-7 in float32; that of the summed cross-entropy has about 1.
NOISE = 1e-6


@pytree_dataclass
class Probe:
    """A kernel that measures its inputs and the gradients of its outputs.

    Attributes:
      kernel: float `[..., i, o]`.
      sum_x2: float32 zeros `[..., i]`; its cotangent is `sum_t mask_t x_t^2`.
      sum_dy2: float32 zeros `[..., o]`; its cotangent is `sum_t (dL/dy_t)^2`.
      mask: float32 `[..., b, t]`, 1 for real tokens: at padding dL/dy is zero but x is not.
      clip: percentile of the token norms at which single tokens are clipped; 100 clips nothing.
    """

    kernel: Array
    sum_x2: Array
    sum_dy2: Array
    mask: Array
    clip: float = struct.field(pytree_node=False, default=100.0)

    @property
    def shape(self) -> Shape:
        """Shape `[..., i, o]` of the kernel."""
        return self.kernel.shape

    def matmul(self, x: Float[Array, "b t i"]) -> Float[Array, "b t o"]:
        """`x @ kernel`; raises BadInput if x has not the tokens of the mask."""
        if x.shape[:-1] != self.mask.shape:
            raise BadInput(
                f"a kernel {list(self.kernel.shape)} got inputs {list(x.shape)} for a mask "
                f"{list(self.mask.shape)}: calibration measures kernels that see every token once"
            )
        return _probed(x, self.kernel, self.sum_x2, self.sum_dy2, self.mask, self.clip)

    def dense(self) -> Array:
        """The kernel."""
        return self.kernel


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _probed(x, kernel, sum_x2, sum_dy2, mask, clip):
    return product(x, kernel)


def _probed_forward(x, kernel, sum_x2, sum_dy2, mask, clip):
    return _probed(x, kernel, sum_x2, sum_dy2, mask, clip), (x, kernel, mask)


def _probed_backward(clip, residuals, dy):
    x, kernel, mask = residuals
    dx = product(dy, kernel.T)
    x2, dy2 = (_square_sum(a.astype(F32), mask, clip) for a in (x, dy))
    return dx, jnp.zeros_like(kernel), x2, dy2, jnp.zeros_like(mask)


def _square_sum(
    a: Float[Array, "*b t c"], mask: Float[Array, "*b t"], clip: float
) -> Float[Array, " c"]:
    squares = jnp.square(a) * mask[..., None]
    if clip < 100:
        norms = jnp.sqrt(jnp.sum(squares, axis=-1))
        limit = jnp.nanquantile(jnp.where(mask > 0, norms, jnp.nan), clip / 100)
        shrink = jnp.minimum(1.0, limit / jnp.maximum(norms, jnp.finfo(F32).tiny))
        squares *= jnp.square(shrink)[..., None]
    return jnp.sum(squares, axis=tuple(range(a.ndim - 1)))


_probed.defvjp(_probed_forward, _probed_backward)


def zero_sums(params: Params, paths: Collection[str]) -> dict[str, Stats]:
    """Zeros in the shapes of the statistics of the kernels `[..., i, o]` at `paths`."""
    shapes = {path: leaf.shape for path, leaf in leaves(params) if path in paths}
    return {p: Stats(jnp.zeros(s[:-1]), jnp.zeros((*s[:-2], s[-1]))) for p, s in shapes.items()}


def insert_probes(
    params: Params, sums: Mapping[str, Stats], mask: Bool[Array, "b t"], clip: float
) -> Params:
    """The tree with a `Probe` in place of each kernel that `sums` names.

    `sums` are zeros; the gradient of a loss by them holds the measurements of the probes.
    """

    def replace(path: str, leaf: Array) -> Array | Weight | Probe:
        if path not in sums:
            return leaf
        stacked = jnp.broadcast_to(
            mask.astype(F32).reshape((1,) * (leaf.ndim - 2) + mask.shape),
            (*leaf.shape[:-2], *mask.shape),
        )
        return Probe(leaf, sums[path].s_in, sums[path].s_out, stacked, clip)

    return map_leaves(replace, params)


def calibrate(
    loss: Callable[[Params, Batch], Float[Array, ""]],
    params: Params,
    batches: Iterable[Batch],
    rules: Rules,
    *,
    clip: float = 100.0,
    shardings: PyTree[jax.sharding.Sharding] | None = None,
    batch_sharding: jax.sharding.NamedSharding | None = None,
) -> dict[str, Stats]:
    """Root mean square of the inputs and of the output gradients of every selected kernel.

        s_in[c] = sqrt(mean_t x_t[c]^2),   s_out[c] = sqrt(mean_t (dL/dy_t[c])^2)

    Means are over real tokens, sums in float32. `L` should be the SUMMED next-token cross-entropy
    of the full-precision model: the mean over tokens would scale the squares by 1/N^2, and the KL
    to the model itself has no gradient.

    Args:
      loss: `loss(params, batch) -> scalar`; the model must multiply through `linear(x, w)`.
      params: full-precision params.
      batches: dicts with `tokens: [b, t]` and `mask: [b, t]` bool (True for real tokens), all of
        one shape; they may hold further arrays for `loss`.
      rules: as for `convert`; kernels whose rule names a spec are measured, embeddings are not.
      clip: percentile of the token norms above which a token's contribution is scaled down.
      shardings: shardings of `params` on a mesh, None for one device.
      batch_sharding: sharding of every array of a batch on that mesh, None for one device.

    Returns:
      `{path: Stats(s_in [..., i], s_out [..., o])}`.

    Raises:
      BadInput: no batch, the statistics of a kernel are not finite, or those of all are zero.
    """
    selected = [path for path in match_rules(params, rules) if not is_table(path)]
    zeros = zero_sums(params, selected)

    def sums(params, batch):
        return jax.grad(lambda z: loss(insert_probes(params, z, batch["mask"], clip), batch))(zeros)

    if shardings is not None and batch_sharding is not None:
        replicated = jax.sharding.NamedSharding(batch_sharding.mesh, jax.sharding.PartitionSpec())
        sums = jax.jit(sums, in_shardings=(shardings, batch_sharding), out_shardings=replicated)
    else:
        sums = jax.jit(sums)

    total, tokens = None, 0
    for batch in batches:
        total = added(total, sums(params, batch))
        tokens += int(jnp.sum(batch["mask"]))
    stats = root_mean(total, tokens)
    check_signal(stats)
    return stats


def added(total: dict[str, Stats] | None, sums: dict[str, Stats]) -> dict[str, Stats]:
    """`total`, the sums of the batches so far (None for none), plus those of one more batch, in
    float64 on the host."""
    found = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
    return found if total is None else jax.tree.map(np.add, total, found)


def root_mean(total: dict[str, Stats] | None, tokens: int) -> dict[str, Stats]:
    """`sqrt(sum / tokens)` in float32.

    Raises:
      BadInput: no token, or the statistics of a kernel are not finite.
    """
    if not tokens:
        raise BadInput("calibration saw no token: give it at least one batch with real tokens")
    stats = jax.tree.map(lambda s: jnp.asarray(np.sqrt(s / tokens), F32), total)
    for path, s in stats.items():
        check_finite(path, s)
    return stats


def check_finite(path: str, stats: Stats) -> None:
    """Raises BadInput if the statistics of the kernel are not finite."""
    for name, s in _named(stats):
        if not np.isfinite(s).all():
            raise BadInput(
                f"calibration of {path}: the statistics of its {name} are not finite; check the "
                "loss on these batches, or calibrate in float32"
            )


def check_signal(stats: Mapping[str, Stats]) -> None:
    """Raises BadInput if the inputs, or the output gradients, of all kernels are zero.

    Those of some kernels may be: nothing reaches the kernels of a block whose output projection is
    zero, as in models that were pruned or padded with blocks.
    """
    for path in list(stats)[:1]:
        for n, (name, _) in enumerate(_named(stats[path])):
            if max(_named(s)[n][1].max() for s in stats.values()) < NOISE:
                raise BadInput(
                    f"calibration of {path}: the statistics of its {name} are all zero or rounding "
                    "noise, as are those of every other kernel; the loss must be the SUM over the "
                    "batch of a loss against labels, such as the cross-entropy of the "
                    "full-precision model, not the distance of the model to itself, and the mask "
                    "must keep some tokens"
                )


def _named(stats: Stats) -> tuple[tuple[str, np.ndarray], ...]:
    return ("inputs", np.asarray(stats.s_in)), ("output gradients", np.asarray(stats.s_out))
