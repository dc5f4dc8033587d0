"""Calibration and initialisation one block at a time, for models that do not fit in memory.

    x_{n+1} = f_n(x_n),   dL/dx_n = (df_n/dx_n)^T dL/dx_{n+1}

Whoever calls keeps the inputs x_n and brings the gradients, last block first. Each block is run
again from its own input with probes in place of its kernels: its pullback gives the sums of squares
and the gradient for the block before it. The statistics are those of `calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rabit_jax.calibration.probes import insert_probes, zero_sums
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.tree import leaves

Block = Callable[[Any, jax.Array], jax.Array]


def block_sums(
    block: Block, params: Any, x: jax.Array, dy: jax.Array, mask: jax.Array,
    paths: Collection[str], clip: float = 100.0,
) -> tuple[jax.Array, jax.Array, dict[str, Stats]]:
    """Output, input gradient and sums of squares of one block over one batch.

    Kernels are constants here, so no gradient of a weight is ever made. Under `jit` what is not
    used is not computed: the sums of x^2 alone need no backward pass.

    Args:
      block: `block(params, x) -> y`; multiplies through `linear(x, w)`.
      params: full-precision params of this block.
      x: `[b, t, d]`, its input.
      dy: `[b, t, d]`, gradient of the loss by its output; of the summed next-token cross-entropy
        for the statistics of `calibrate`.
      mask: `[b, t]` bool, True for real tokens.
      paths: of the kernels to measure, as they stand in `params`.
      clip: percentile of the token norms above which a token's contribution is scaled down.

    Returns:
      `y` and `dx`, `[b, t, d]`, and `{path: Stats}` of `sum_t x_t^2` and `sum_t (dL/dy_t)^2`;
      `probes.added` and `probes.root_mean` make statistics of those of all batches.
    """
    def run(sums, x):
        return block(insert_probes(params, sums, mask, clip), x)

    y, pull = jax.vjp(run, zero_sums(params, paths), x)
    sums, dx = pull(dy.astype(y.dtype))
    return y, dx, sums


def init_block(
    params: Any,
    layer: int,
    specs: Mapping[str, Any],
    stats: Mapping[str, Stats] | None = None,
    keys: Mapping[str, jax.Array] | None = None,
    done: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """What `pack(convert(...))` makes of one layer of every selected kernel, one at a time.

    Args:
      params: full-precision params of the block, kernels `[i, o]`.
      layer: its number.
      specs: `{path: spec}` from `match_rules`, paths as they stand in `params`.
      stats: statistics of this layer, `[i]` and `[o]`; None without calibration.
      keys: `{path: keys [l]}` from `layer_keys`, for specs that draw random numbers.
      done: called with a kernel's path when its node is ready.

    Returns:
      `{path: packed node [1, i, o]}` and `{path: |W - W_hat|^2 / |W|^2}`, before scales are rounded
      to 16 bits.

    Raises:
      BadInput: a scale leaves the 16-bit range; the message names kernel and layer.
    """
    packed, errors = {}, {}
    for path, w in leaves(params):
        if path not in specs:
            continue
        own = None if stats is None else jax.tree.map(lambda s: s[None], stats[path])
        key = None if keys is None else keys[path][layer : layer + 1]
        node = specs[path].init(w[None], own, key)
        errors[path] = float(_relative_error(w, node)[0])
        packed[path] = jax.block_until_ready(node.pack(f"{path} of layer {layer}"))
        if done is not None:
            done(path)
    return packed, errors


@jax.jit
def _relative_error(w: jax.Array, node: Any) -> jax.Array:
    missed = jnp.square(w[None] - node.dense())
    return missed.sum((-1, -2)) / jnp.square(w).sum((-1, -2))
