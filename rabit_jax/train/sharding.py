"""Where arrays live on a mesh with axes `data` and `tensor`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import BLOCK_BYTES
from rabit_jax.tree import is_weight, map_leaves
from rabit_jax.types import Array, Params, Shape, Weight
from rabit_jax.weights.grouped_sign import GroupedSign
from rabit_jax.weights.leaves import Leaf, declaration
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.table import Table

AXES = ("data", "tensor")
Axes: TypeAlias = tuple[str | None, str | None]

# Axes of the mesh for the (in, out) axes of a kernel, by the whole path in our decoder's params:
# the projections into a block split their outputs, those out of it their inputs, so that one
# reduction per block crosses devices. Anything else, other models' kernels included, is whole on
# every device: what their names mean is not known here.
KERNEL_AXES = (
    (r"layers/attn/[qkv]/kernel|layers/mlp/(gate|up)/kernel|head/kernel", (None, "tensor")),
    (r"layers/attn/o/kernel|layers/mlp/down/kernel|embed/embedding", ("tensor", None)),
)


def make_mesh(
    axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh of all devices, or of those given; by default all on `data`.

    Raises:
      BadInput: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    axes = dict(axes or {})
    found = jax.devices() if devices is None else devices
    count = len(found)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise BadInput(f"mesh names the axis {unknown[0]!r}: the axes are {' and '.join(AXES)}")
    if min(axes.values(), default=1) < 1:
        raise BadInput(f"mesh {axes} has an axis below 1: every axis needs a device")
    if "data" not in axes:
        axes["data"] = count // axes.get("tensor", 1)
    sizes = tuple(axes.get(name, 1) for name in AXES)
    if sizes[0] * sizes[1] != count:
        raise BadInput(
            f"mesh {dict(zip(AXES, sizes, strict=True))} has {sizes[0] * sizes[1]} places for "
            f"{count} devices: "
            "make the product of its sizes equal to the number of devices"
        )
    return Mesh(np.asarray(found).reshape(sizes), AXES)


def one_device_mesh() -> Mesh:
    """Mesh of the first device alone."""
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), AXES)


def kernel_axes(path: str) -> Axes:
    """Axes of the mesh that the inputs and the outputs of a kernel are split over."""
    return next((axes for known, axes in KERNEL_AXES if re.fullmatch(known, path)), (None, None))


def _sharding(spec: Sequence[str | None], shape: Shape, mesh: Mesh) -> NamedSharding:
    """Drop an axis that does not divide its dimension: that array is then whole along it."""
    full = (*(None,) * (len(shape) - len(spec)), *spec)
    kept = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(full, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """Shardings for a params tree: leaf by leaf, from the kernel's path and each leaf's axes.

    An array `[..., i, o]` is split as `kernel_axes` of its path tells. So is each array of a weight
    node along its declared axes i and o, and along packed rows of them where every device gets
    whole blocks. Other axes (paths, groups, ranks, tables) are whole, and so is a dimension that
    the mesh does not divide.
    """

    def place(path: str, leaf: Any) -> Any:
        axes = kernel_axes(path)
        if is_weight(leaf):
            return weight_shardings(leaf, axes, mesh)
        return _sharding(axes if len(leaf.shape) > 1 else (), leaf.shape, mesh)

    return map_leaves(place, params)


def weight_shardings(node: Weight, axes: Axes, mesh: Mesh) -> PyTree[NamedSharding]:
    """Shardings for the arrays of one weight node, whose matrix `[..., i, o]` is split over `axes`.

    A kernel of several input or output axes is split along the first of them, for its reshaped
    product is then local to a device: where the mesh does not divide that, it is whole.
    """
    if isinstance(node, Reshaped):
        sides = zip(axes, (node.inputs, node.outputs), strict=True)
        axes_in, axes_out = (a if a and own[0] % mesh.shape[a] == 0 else None for a, own in sides)
        matrix = weight_shardings(node.matrix, (axes_in, axes_out), mesh)
        return node.replace(matrix=matrix)
    if isinstance(node, Table):
        return node.replace(matrix=weight_shardings(node.matrix, (axes[1], axes[0]), mesh))
    if isinstance(node, GroupedSign):
        return node.replace(blocks=_group_shardings(node.blocks, axes, mesh))
    split = {"i": axes[0], "o": axes[1]}

    def place(declared: Leaf, array: Array) -> NamedSharding:
        names = declared.names
        behind = array.shape[len(array.shape) - len(names) :]
        spec = [_split(name, n, split, mesh) for name, n in zip(names, behind, strict=True)]
        return _sharding(spec, array.shape, mesh)

    return jax.tree.map(place, declaration(node), node)


def _group_shardings(blocks: Any, axes: Axes, mesh: Mesh) -> Any:
    """Shardings of groups of inputs that lie one below the other, arrays `[..., n, *declared]`.

    Over the axis of the inputs each device gets whole groups, or where the mesh does not divide
    them a part of every one.
    """
    over = axes[0]
    whole = over is None or blocks.shape[-3] % mesh.shape[over] == 0
    if not whole:
        return weight_shardings(blocks, axes, mesh)

    def place(declared: Leaf, array: Array) -> NamedSharding:
        names = [axes[1] if name == "o" else None for name in declared.names]
        return _sharding((over, *names), array.shape, mesh)

    return jax.tree.map(place, declaration(blocks), blocks)


def _split(axis: str, length: int, split: Mapping[str, str | None], mesh: Mesh) -> str | None:
    """Axis of the mesh for one declared axis; packed rows are split between whole blocks alone."""
    over = split.get(axis.removesuffix("/8"))
    if over and axis.endswith("/8") and length // BLOCK_BYTES % mesh.shape[over]:
        return None
    return over


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches `[b, t]` are split by rows over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def like_params(
    tree: PyTree, params: Params, shardings: PyTree[NamedSharding], mesh: Mesh
) -> PyTree[NamedSharding]:
    """Shardings for a tree that holds copies of params (optimiser state), by path and shape.

    A leaf whose path ends in a parameter's path and has its shape is placed like it; any other
    (step counts) is replicated.
    """
    key = jax.tree_util.keystr
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    placed = jax.tree.leaves(shardings)
    known = {key(path): (leaf.shape, s) for (path, leaf), s in zip(flat, placed, strict=True)}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(key(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)
