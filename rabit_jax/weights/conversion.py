"""Pure functions from params tree to params tree: `convert`, `dense` and `pack`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.tree import Rules, is_weight, layer_keys, leaves, map_leaves, match_rules
from rabit_jax.types import Array, Param
from rabit_jax.weights.reshaped import in_shape, matrix_shape
from rabit_jax.weights.table import Table, is_table

LLAMA_LINEARS = r"layers/(attn/[qkvo]|mlp/(gate|up|down))/kernel"
LLAMA_ENDS = r"embed/embedding|head/kernel"


def convert(
    params: PyTree[Array],
    rules: Rules,
    stats: Mapping[str, Stats] | None = None,
    key: Array | None = None,
    done: Callable[[str], None] | None = None,
) -> PyTree:
    """Replace the kernels that the rules select by weight nodes; everything else stays as it is.

    Args:
      params: tree of arrays, for example that of any Flax model; kernels `[..., i, o]`, leading
        axes are stacked layers.
      rules: `[(regex, spec or None)]`; the first that fullmatches a path wins, None keeps the
        array.
      stats: `{path: Stats}` from `calibrate` or `calibrate_flax`; without them every channel is
        equally important. They also tell which axes of an `nn.DenseGeneral` kernel, such as
        `[d, heads, head_dim]`, are its inputs: its node is then a `Reshaped` matrix. An embedding,
        the parameter `embedding` of Flax's `nn.Embed`, has none: it becomes a `Table`, whose rows
        are the outputs of a head, and every channel of it is equally important.
      key: PRNG key for specs that draw random numbers.
      done: called with a kernel's path when its node is ready, for a progress bar.

    Returns:
      The tree with `spec.init(kernel, stats, key)` in place of each selected kernel.

    Raises:
      BadInput: see `match_rules`; a rule that names something else than a spec; or `stats` lacks a
        selected kernel.

    Example:
      >>> student = convert(params, [(LLAMA_LINEARS, ResidualSignSpec(k=2))], stats)
    """
    selected = match_rules(params, rules)
    for path, spec in selected.items():
        if not hasattr(spec, "init") or isinstance(spec, type):
            raise BadInput(f"the rule for {path} names {spec!r}, wanted a spec such as "
                           "ResidualSignSpec(k=2), or None")
    kernels = [path for path in selected if not is_table(path)]
    missing = sorted(set(kernels) - set(stats)) if stats is not None else []
    if missing:
        raise BadInput(f"no calibration statistics for {missing[0]}: calibrate with the same rules")
    found = dict(leaves(params))
    own = {p: None if stats is None or is_table(p) else stats[p] for p in selected}
    shapes = {p: matrix_shape(p, found[p].shape, own[p]) for p in selected}
    keys = {} if key is None else layer_keys(key, {p: shapes[p][:-2] for p in selected})

    def replace(path: str, leaf: Param) -> Param:
        if path not in selected or is_weight(leaf):  # no rule selects a weight node
            return leaf
        spec, one_key = selected[path], keys.get(path)
        if is_table(path):
            node = Table(spec.init(jnp.swapaxes(leaf, -1, -2), None, one_key))
        else:
            matrix = leaf if leaf.shape == shapes[path] else leaf.reshape(shapes[path])
            node = in_shape(spec.init(matrix, own[path], one_key), leaf.shape)
        if done is not None:
            jax.block_until_ready(node)
            done(path)
        return node

    return map_leaves(replace, params)


def dense(params: PyTree) -> PyTree[Array]:
    """The tree with every weight node replaced by the matrix it multiplies by.

    Differentiable: gradients reach the latents by the node's straight-through rule, so a model that
    knows nothing of weight nodes trains through `model.apply({"params": dense(params)}, ...)`.
    """
    return map_leaves(lambda _, leaf: leaf.dense() if is_weight(leaf) else leaf, params)


def pack(params: PyTree) -> PyTree:
    """The tree with every weight node in its deployed form (bits and 16-bit scales).

    Raises:
      BadInput: a scale leaves the 16-bit range; the message names the layer.
    """
    return map_leaves(lambda path, leaf: leaf.pack(path) if is_weight(leaf) else leaf, params)
