"""The mesh of a run, axes `data`, `fsdp` and `tensor`, and where batches and states live on it.

Where params live is told by `weights.shardings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rabit_jax.errors import BadInput
from rabit_jax.types import Array, Device, Params, Shape
from rabit_jax.weights.shardings import (
    AXES,
    ROWS,
    kernel_axes,
    param_shardings,
    row_shards,
    weight_shardings,
)

__all__ = [
    "AXES", "batch_sharding", "kernel_axes", "layer_by_layer", "like_params", "make_mesh",
    "one_device_mesh", "param_shardings", "replicated", "row_shards", "weight_shardings",
]

# Shape and sharding of every parameter by its path.
Placed: TypeAlias = dict[str, tuple[Shape, NamedSharding]]


def make_mesh(
    axes: Mapping[str, int] | None = None, devices: Sequence[Device] | None = None
) -> Mesh:
    """Mesh of all devices of all processes, or of those given; what the axes leave is on `data`.

    Raises:
      BadInput: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    axes = dict(axes or {})
    found = jax.devices() if devices is None else devices
    count = len(found)
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise BadInput(f"mesh names the axis {unknown[0]!r}: the axes are {', '.join(AXES)}")
    if min(axes.values(), default=1) < 1:
        raise BadInput(f"mesh {axes} has an axis below 1: every axis needs a device")
    if "data" not in axes:
        axes["data"] = max(1, count // prod(axes.values()))
    sizes = tuple(axes.get(name, 1) for name in AXES)
    if prod(sizes) != count:
        raise BadInput(
            f"mesh {dict(zip(AXES, sizes, strict=True))} has {prod(sizes)} places for "
            f"{count} devices: "
            "make the product of its sizes equal to the number of devices"
        )
    # Neighbours on tensor, the axis that talks most, are neighbours in the machine.
    # A torus of 4 x 4 x 4 is cut into 8 x 8 too, which `jax.make_mesh` refuses.
    placed = create_device_mesh(sizes, found, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device_mesh() -> Mesh:
    """Mesh of the first device alone."""
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches `[b, t]` are split by rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in ROWS if a in mesh.shape)))


def like_params(
    tree: PyTree, params: Params, shardings: PyTree[NamedSharding], mesh: Mesh
) -> PyTree[NamedSharding]:
    """Shardings for a tree that holds copies of params (optimiser state), by path and shape.

    A leaf whose path ends in a parameter's path and has its shape is placed like it; any other
    (step counts) is replicated.
    """
    placed = _by_path(params, shardings)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _found(placed, path, leaf) or replicated(mesh), tree)


def layer_by_layer(
    transform: optax.GradientTransformation, params: Params, shardings: PyTree[NamedSharding],
    mesh: Mesh,
) -> optax.GradientTransformation:
    """A transform that needs whole matrices, such as Muon, with whole layers on each device.

    Arrays `[..., i, o]` that are split over i and o are exchanged (all-to-all) so that every device
    has its share of the matrices whole, and back behind the transform. They take as much memory in
    one layout as in the other, and every matrix is worked on once; left to itself the partitioner
    would gather all layers on all devices. A single matrix is gathered.

    Args:
      transform: of updates; each matrix by itself.
      params: what it updates, by path.
      shardings: of `params`.
      mesh: of them.
    """
    placed = _by_path(params, shardings)
    if all(sharding.is_fully_replicated for _, sharding in placed.values()):
        return transform

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def spec(path: tuple, leaf: Array) -> PartitionSpec:
            found = _found(placed, path, leaf)
            return found.spec if found else PartitionSpec()

        trees = (updates, state, params)
        specs = jax.tree_util.tree_map_with_path(spec, trees)
        shapes = jax.tree.map(lambda leaf: leaf.shape, trees[:2])

        def local(*trees: PyTree) -> tuple[PyTree, PyTree]:
            moved = transform.update(*jax.tree.map(partial(_whole, mesh), trees, specs))
            return jax.tree.map(partial(_in_parts, mesh), moved, specs[:2], shapes)

        run = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
        return run(*trees)

    return optax.GradientTransformation(transform.init, update)


def _split_axes(spec: PartitionSpec, ndim: int) -> list[tuple[str, int]]:
    """`(axis of the mesh, axis of the array)` of each of the last two, -2 and -1, that is split."""
    full = [*spec, *(None,) * (ndim - len(spec))]
    return [(str(name), axis) for axis, name in ((-2, full[-2]), (-1, full[-1])) if name]


def _whole(mesh: Mesh, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A device's part of `[..., i, o]` -> its share of the whole matrices, `[n, i, o]`.

    Where the devices do not divide the matrices, some have zeros. A single matrix is on all.
    """
    split = _split_axes(spec, x.ndim) if x.ndim > 1 else []
    if not split:
        return x
    if x.ndim == 2:
        for name, axis in split:
            x = jax.lax.all_gather(x, name, axis=x.ndim + axis, tiled=True)
        return x
    x = x.reshape(-1, *x.shape[-2:])
    devices = prod(mesh.shape[name] for name, _ in split)
    x = jnp.pad(x, ((0, -len(x) % devices), (0, 0), (0, 0)))
    for name, axis in split:
        x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=3 + axis, tiled=True)
    return x


def _in_parts(mesh: Mesh, x: jax.Array, spec: PartitionSpec, shape: Shape) -> jax.Array:
    """The inverse of `_whole`; `shape` is that of the whole array."""
    split = _split_axes(spec, len(shape)) if len(shape) > 1 else []
    if not split:
        return x
    for name, axis in reversed(split):
        if len(shape) == 2:
            own = shape[axis] // mesh.shape[name]
            begin = jax.lax.axis_index(name) * own
            x = jax.lax.dynamic_slice_in_dim(x, begin, own, axis=2 + axis)
        else:
            x = jax.lax.all_to_all(x, name, split_axis=3 + axis, concat_axis=0, tiled=True)
    return x if len(shape) == 2 else x[: prod(shape[:-2])].reshape(*shape[:-2], *x.shape[-2:])


def _by_path(params: Params, shardings: PyTree[NamedSharding]) -> Placed:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    placed = jax.tree.leaves(shardings)
    return {jax.tree_util.keystr(path): (leaf.shape, s)
            for (path, leaf), s in zip(flat, placed, strict=True)}


def _found(placed: Placed, path: tuple, leaf: Array) -> NamedSharding | None:
    """The sharding of the parameter whose path ends this one, and whose shape the leaf has."""
    for start in range(len(path)):
        shape, sharding = placed.get(jax.tree_util.keystr(path[start:]), (None, None))
        if shape == leaf.shape:
            return sharding
    return None
