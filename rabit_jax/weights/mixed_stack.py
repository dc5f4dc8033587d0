"""Stacks of layers that have different numbers of sign paths, and the first paths of a weight.

A scan over layers wants arrays of one shape. So a stack has the k of its largest layer, and the
scales of a path that a layer does not have are 0: it adds nothing, and as the gradient of each of
two scales is proportional to the other one, training leaves it so. `PackedSign.layer_k` says how
many paths each layer has; files hold those alone, and sizes count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from rabit_jax.errors import BadInput
from rabit_jax.tree import leaves, map_leaves
from rabit_jax.types import Array, Json, Param, Params
from rabit_jax.weights.leaves import Node, WeightNode, leaf_axes
from rabit_jax.weights.residual_sign import ResidualSign
from rabit_jax.weights.sign_paths import PackedSign


def stacked(nodes: Sequence[Node]) -> Node:
    """The node `[l, i, o]` of nodes `[i, o]` of one representation.

    Args:
      nodes: alike in everything, or `PackedSign` or `ResidualSign` that differ in k; their arrays
        may be of NumPy, and are stacked there.
    """
    ks = tuple(node.k if isinstance(node, (PackedSign, ResidualSign)) else 0 for node in nodes)
    if len(set(ks)) > 1:
        own = {"layer_k": ks} if isinstance(nodes[0], PackedSign) else {}
        nodes = [_padded(node, max(ks)).replace(**own) for node in nodes]
    return jax.tree.map(_stack, *nodes)


def unstacked(node: Node) -> list[Node]:
    """The nodes `[i, o]` of the layers of a node `[l, i, o]`, each with its own number of paths."""
    layers = range(node.shape[0])
    taken = [jax.tree.map(lambda a, n=n: a[n], node) for n in layers]
    if not isinstance(node, PackedSign) or node.layer_k is None:
        return taken
    return [_first(one.replace(layer_k=None), k)
            for one, k in zip(taken, node.layer_k, strict=True)]


def layer_headers(node: WeightNode) -> list[Json]:
    """`header()` of each layer of a node `[l, i, o]`."""
    header, ks = node.header(), node.layer_k if isinstance(node, PackedSign) else None
    return [header | ({} if ks is None else {"k": ks[n]}) for n in range(node.shape[0])]


def with_paths(params: Params, ks: Mapping[str, Sequence[int]]) -> Params:
    """The outline of a tree whose weights at the paths `ks` are packed with so many sign paths in
    each layer, for their sizes and costs."""
    def outline(path: str, leaf: Param) -> Param:
        if path not in ks or not has_paths(leaf):
            return leaf
        layers, i, o = leaf.shape
        one = PackedSign.abstract({"in": i, "out": o, "k": max(ks[path])})
        stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((layers, *a.shape), a.dtype), one)
        return stack.replace(layer_k=tuple(ks[path]))

    return map_leaves(outline, params)


def first_paths(params: Params, paths: int) -> Params:
    """The model of the first sign paths of every weight of its blocks.

        W_hat = sum_{i <= paths} W_hat_i

    The signs of a path follow from those before it alone, so this is the model with k = paths that
    nested training (`train.losses.nested_loss`) has trained. Weights with fewer paths stay as they
    are, and so do embedding, head and representations without paths.

    Args:
      params: packed or in training form.
      paths: at least 1.

    Raises:
      BadInput: no weight has so many paths.

    Example:
      >>> small = first_paths(params, 1)
    """
    check_paths(paths, sign_paths(params))
    return at_most_paths(params, paths)


def at_most_paths(params: Params, paths: int) -> Params:
    """`first_paths`, or the whole model where no weight has so many, as under a budget."""
    return map_leaves(lambda path, leaf: cut(path, leaf, paths), params)


def sign_paths(params: Params) -> list[int]:
    """The numbers of sign paths of the weights of the blocks that `first_paths` can cut."""
    return [_count(leaf) for path, leaf in leaves(params)
            if path.startswith("layers/") and has_paths(leaf)]


def _count(node: WeightNode) -> int:
    return _count(getattr(node, node.paths_of)) if node.paths_of else node.sizes()["k"]


def cut(path: str, leaf: Param, paths: int) -> Param:
    """What `first_paths` makes of one parameter."""
    return narrowed(leaf, paths) if path.startswith("layers/") else leaf


def narrowed(leaf: Param, paths: int) -> Param:
    """A weight with its first paths; one with fewer, or another parameter, as it is."""
    return _first(leaf, paths) if has_paths(leaf) else leaf


def check_paths(paths: int, found: Sequence[int]) -> None:
    """Raises BadInput where no weight, of `found` numbers of sign paths, has `paths` of them."""
    most = max(found, default=0)
    if not 1 <= paths <= most:
        has = f"the model's weights have {most} sign paths" if most else (
            "the model's weights have no sign paths")
        raise BadInput(f"paths is {paths}, and {has}: ask for " +
                       (f"1 to {most}" if most else "none"))


def has_paths(node: object) -> TypeGuard[WeightNode]:
    """Whether the first paths of a weight are a weight of the same kind."""
    if isinstance(node, WeightNode) and node.paths_of:
        return has_paths(getattr(node, node.paths_of))
    return isinstance(node, WeightNode) and any(
        "k" in axes for _, axes in leaf_axes(node)) and not any(
        "k-1" in axes for _, axes in leaf_axes(node))


def _first(node: Node, paths: int) -> Node:
    """The node with its first paths."""
    if node.paths_of:
        return node.replace(**{node.paths_of: _first(getattr(node, node.paths_of), paths)})
    changes: dict[str, object] = {}
    for name, axes in leaf_axes(node):
        array = getattr(node, name)
        if "k" in axes and array is not None:
            at = array.ndim - len(axes) + axes.index("k")
            changes[name] = array[(slice(None),) * at + (slice(paths),)]
    if isinstance(node, PackedSign) and node.layer_k is not None:
        ks = tuple(min(k, paths) for k in node.layer_k)
        changes["layer_k"] = None if len(set(ks)) == 1 else ks
    return node.replace(**changes)


def _padded(node: Node, k: int) -> Node:
    """The node `[i, o]` with paths of scales 0 behind its own."""
    changes = {}
    for name, axes in leaf_axes(node):
        if "k" in axes:
            array = getattr(node, name)
            xp = np if isinstance(array, np.ndarray) else jnp
            more = [(0, k - array.shape[0] if axis == "k" else 0) for axis in axes]
            changes[name] = xp.pad(array, more)
    return node.replace(**changes)


def _stack(*arrays: Array) -> Array | np.ndarray:
    return np.stack(arrays) if isinstance(arrays[0], np.ndarray) else jnp.stack(arrays)
