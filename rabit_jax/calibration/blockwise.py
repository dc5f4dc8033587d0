"""Calibration and initialisation one block at a time, for models that do not fit in memory.

    x_{n+1} = f_n(x_n),   dL/dx_n = (df_n/dx_n)^T dL/dx_{n+1}

The caller stores the inputs x_n and passes the gradients, last block first. Each block is run again
from its own input with probes in place of its kernels: its pullback gives the sums of squares and
the gradient for the block before it. The statistics equal those of `calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax import hosts
from rabit_jax.calibration.probes import insert_probes, zero_sums
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32
from rabit_jax.tree import leaves
from rabit_jax.types import Array, Params, Spec, Weight

Block = Callable[[Params, Array], Array]


def block_sums(
    block: Block,
    params: Params,
    x: Float[Array, "b t d"],
    dy: Float[Array, "b t d"],
    mask: Bool[Array, "b t"],
    paths: Collection[str],
    clip: float = 100.0,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], dict[str, Stats]]:
    """Output, input gradient and sums of squares of one block over one batch.

    Kernels are constants here, so no gradient of a weight is computed. Under `jit`, results that
    are not used are not computed: the sums of x^2 alone need no backward pass.

    Args:
      block: `block(params, x) -> y`; multiplies through `linear(x, w)`.
      params: full-precision params of this block.
      x: its input.
      dy: gradient of the loss by its output; the loss of `calibrate` is the summed next-token
        cross-entropy.
      mask: True for real tokens.
      paths: paths in `params` of the kernels to measure.
      clip: percentile of the token norms above which a token's contribution is scaled down.

    Returns:
      `(y, dx, {path: Stats})`, the last of `sum_t x_t^2` and `sum_t (dL/dy_t)^2`. `probes.added`
      and `probes.root_mean` turn the sums of all batches into statistics.
    """

    def run(sums: dict[str, Stats], x: Array) -> Array:
        return block(insert_probes(params, sums, mask, clip), x)

    y, pull = jax.vjp(run, zero_sums(params, paths), x)
    sums, dx = pull(dy.astype(y.dtype))
    return y, dx, sums


def init_block(
    params: Params,
    layer: int,
    specs: Mapping[str, Spec],
    stats: Mapping[str, Stats] | None = None,
    keys: Mapping[str, Array] | None = None,
    done: Callable[[str], None] | None = None,
) -> tuple[dict[str, Weight], dict[str, float]]:
    """The result of `pack(convert(...))` for one layer, computed one kernel at a time.

    Args:
      params: full-precision params of the block, kernels `[i, o]`; they may lie on a mesh of
        several processes, which all call this.
      layer: its number.
      specs: `{path: spec}` from `match_rules`, with paths in `params`.
      stats: statistics of this layer, `[i]` and `[o]`; None without calibration.
      keys: `{path: keys [l]}` from `layer_keys`, for specs that draw random numbers.
      done: called with the path of each kernel that is ready.

    Returns:
      `{path: packed node [1, i, o]}` and `{path: |W - W_hat|^2 / |W|^2}`, before scales are rounded
      to 16 bits.

    Raises:
      BadInput: a scale leaves the 16-bit range; the message names kernel and layer.
    """
    packed, errors, kernels = {}, {}, dict(leaves(params))
    for path, node in block_nodes(params, layer, specs, stats, keys):
        errors[path] = first_of(relative_error(kernels[path], node))
        whole = hosts.whole(node)  # every process packs, in the same time as one would
        packed[path] = jax.block_until_ready(whole.pack(f"{path} of layer {layer}"))
        if done is not None:
            done(path)
    return packed, errors


def block_nodes(
    params: Params,
    layer: int,
    specs: Mapping[str, Spec],
    stats: Mapping[str, Stats] | None = None,
    keys: Mapping[str, Array] | None = None,
) -> Iterator[tuple[str, Weight]]:
    """The nodes `[1, i, o]` of `convert` for one layer, one kernel at a time, with their paths.

    The arguments are those of `init_block`.
    """
    for path, w in leaves(params):
        if path in specs:
            own = None if stats is None else jax.tree.map(lambda s: s[None], stats[path])
            key = None if keys is None else keys[path][layer : layer + 1]
            yield path, specs[path].init(w[None], own, key)


def first_of(found: Float[Array, " l"]) -> float:
    """The first of the numbers, on a mesh of several processes in all of them."""
    return float(hosts.whole(found)[0])


@jax.jit
def relative_error(w: Float[Array, "i o"], node: Weight) -> Float[Array, " l"]:
    """`|W - W_hat|^2 / |W|^2` of a node `[l, i, o]`; that of zeros, as of a pruned projection, is
    0."""
    missed = jnp.square(w[None] - node.dense())
    return missed.sum((-1, -2)) / jnp.maximum(jnp.square(w).sum((-1, -2)), jnp.finfo(F32).tiny)
