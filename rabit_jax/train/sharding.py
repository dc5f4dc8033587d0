"""Where arrays live on a mesh with axes `data` and `tensor`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rabit_jax.errors import BadInput
from rabit_jax.tree import is_weight, map_leaves

AXES = ("data", "tensor")

# (in, out) axes of a kernel: the projections into a block split their outputs, those out of it
# their inputs, so that one reduction per block crosses devices.
KERNEL_AXES = (
    (r".*(q|k|v|gate|up|head)/kernel", (None, "tensor")),
    (r".*(o|down)/kernel", ("tensor", None)),
    (r".*embedding", ("tensor", None)),
)

# Fields of weight nodes with the role "scale", by the side of the matrix they scale.
INPUT_SCALES, OUTPUT_SCALES = ("h", "d_in"), ("g", "d_out", "s")


def make_mesh(axes: Mapping[str, int] | None = None) -> Mesh:
    """Mesh of all devices; by default all on `data`.

    Raises:
      BadInput: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    axes = dict(axes or {})
    count = len(jax.devices())
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
    return Mesh(np.asarray(jax.devices()).reshape(sizes), AXES)


def _kernel_axes(path: str) -> tuple[str | None, str | None]:
    return next(
        (axes for pattern, axes in KERNEL_AXES if re.fullmatch(pattern, path)), (None, None)
    )


def _fit(spec: tuple, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Drop an axis that does not divide its dimension: that array is then whole along it."""
    full = (None,) * (len(shape) - len(spec)) + spec
    kept = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(full, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Shardings for a params tree, leaf by leaf from the kernel's path and each leaf's role.

    A latent `[..., i, o]`, or one that has one of the two axes, is split like the kernel it stands
    for; of its scales, `g [..., k, o]` like the outputs and `h [..., k, i]` like the inputs; packed
    bits `[..., k, o, i/8]` along the outputs; levels and codes by the same rule where they have
    outputs.
    """

    def place(path: str, leaf: Any) -> Any:
        axis_in, axis_out = _kernel_axes(path)
        if not is_weight(leaf):
            spec = (axis_in, axis_out) if len(leaf.shape) > 1 else (None,) * len(leaf.shape)
            return _fit(spec, leaf.shape, mesh)
        i, o = leaf.shape[-2:]
        scale_axes = dict.fromkeys(INPUT_SCALES, axis_in) | dict.fromkeys(OUTPUT_SCALES, axis_out)

        def leaf_sharding(path: tuple, x: Any, role: str) -> NamedSharding:
            if role == "scale":
                return _fit((scale_axes.get(path[-1].name),), x.shape, mesh)
            rows, columns = x.shape[-2:]
            if role == "sign" and x.dtype == np.uint8:
                return _fit((axis_out if rows == o else None, None), x.shape, mesh)
            axes = (axis_in if rows == i else None, axis_out if columns == o else None)
            return _fit(axes, x.shape, mesh)

        return jax.tree_util.tree_map_with_path(leaf_sharding, leaf, leaf.roles())

    return map_leaves(place, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches `[b, t]` are split by rows over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def like_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
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
