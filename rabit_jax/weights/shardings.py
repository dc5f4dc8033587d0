"""Where the arrays of params live on a mesh, and how a layer gathers what it multiplies by.

A mesh has the axes `data`, `fsdp` and `tensor`, any of size 1. Batches are split by rows over data
and fsdp. A kernel `[..., i, o]` is split over tensor along the side that its place in a block
says, and over fsdp along the other; so parameters and optimiser state take 1 / (fsdp x tensor) of
their bytes on each device. Before a layer multiplies, its own slice of each kernel is gathered
over fsdp, and its gradient is summed and scattered back (Rajbhandari et al., ZeRO, stage 3,
arXiv 1910.02054): the partitioner never meets a stacked parameter that has to be whole.

A jitted function whose arguments lie on a mesh knows that mesh from their types, so a model needs
no argument for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, PyTree

from rabit_jax.kernels.layout import BLOCK_BYTES
from rabit_jax.tree import is_weight, map_leaves, pytree_dataclass
from rabit_jax.types import Array, Param, Params, Shape, Weight
from rabit_jax.weights.axes import Leaf
from rabit_jax.weights.grouped_sign import GroupedSign
from rabit_jax.weights.leaves import WeightNode, declaration, static
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.seam import linear
from rabit_jax.weights.table import Table

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are split over
AnyMesh: TypeAlias = Mesh | AbstractMesh
Axes: TypeAlias = tuple[str | None, str | None]

# Axes of the mesh for the (in, out) axes of a kernel, by the whole path in our decoder's params:
# the projections into a block split their outputs over tensor, those out of it their inputs, so
# that one reduction per block crosses devices; the other side is split over fsdp. Anything else,
# other models' kernels included, is whole on every device: what their names mean is not known here.
KERNEL_AXES: tuple[tuple[str, Axes], ...] = (
    (r"layers/attn/[qkv]/kernel|layers/mlp/(gate|up)/kernel|head/kernel", ("fsdp", "tensor")),
    (r"layers/attn/o/kernel|layers/mlp/down/kernel|embed/embedding", ("tensor", "fsdp")),
)


def kernel_axes(path: str) -> Axes:
    """Axes of the mesh that the inputs and the outputs of a kernel are split over."""
    return next((axes for known, axes in KERNEL_AXES if re.fullmatch(known, path)), (None, None))


def axis_size(mesh: AnyMesh, axis: str) -> int:
    """Devices along an axis of the mesh, 1 for an axis that it has not."""
    return mesh.shape.get(axis, 1)


def _sharding(spec: Sequence[str | None], shape: Shape, mesh: AnyMesh) -> NamedSharding:
    """Drop an axis that does not divide its dimension: that array is then whole along it."""
    full = (*(None,) * (len(shape) - len(spec)), *spec)
    kept = [a if a and axis_size(mesh, a) > 1 and n % axis_size(mesh, a) == 0 else None
            for a, n in zip(full, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def param_shardings(params: Params, mesh: AnyMesh) -> Params:
    """Shardings for a params tree: leaf by leaf, from the kernel's path and each leaf's axes.

    An array `[..., i, o]` is split as `kernel_axes` of its path tells. So is each array of a weight
    node along its declared axes i and o, and along packed rows of them where every device gets
    whole blocks. Other axes (paths, groups, ranks, tables) are whole, and so is a dimension that
    the mesh does not divide.
    """

    def place(path: str, leaf: Param) -> PyTree[NamedSharding]:
        axes = kernel_axes(path)
        if is_weight(leaf):
            return weight_shardings(leaf, axes, mesh)
        return _sharding(axes if len(leaf.shape) > 1 else (), leaf.shape, mesh)

    return map_leaves(place, params)


def weight_shardings(node: Weight, axes: Axes, mesh: AnyMesh) -> PyTree[NamedSharding]:
    """Shardings for the arrays of one weight node, whose matrix `[..., i, o]` is split over `axes`.

    A kernel of several input or output axes is split along the first of them, for its reshaped
    product is then local to a device: where the mesh does not divide that, it is whole.
    """
    if isinstance(node, Reshaped):
        sides = zip(axes, (node.inputs, node.outputs), strict=True)
        axes_in, axes_out = (
            a if a and own[0] % axis_size(mesh, a) == 0 else None for a, own in sides)
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


def _group_shardings(
    blocks: WeightNode, axes: Axes, mesh: AnyMesh
) -> PyTree[NamedSharding]:
    """Shardings of groups of inputs that lie one below the other, arrays `[..., n, *declared]`.

    Over the axis of the inputs each device gets whole groups, or where the mesh does not divide
    them a part of every one.
    """
    over = axes[0]
    whole = over is None or blocks.shape[-3] % axis_size(mesh, over) == 0
    if not whole:
        return weight_shardings(blocks, axes, mesh)

    def place(declared: Leaf, array: Array) -> NamedSharding:
        names = [axes[1] if name == "o" else None for name in declared.names]
        return _sharding((over, *names), array.shape, mesh)

    return jax.tree.map(place, declaration(blocks), blocks)


def _split(axis: str, length: int, split: Mapping[str, str | None], mesh: AnyMesh) -> str | None:
    """Axis of the mesh for one declared axis; packed rows are split between whole blocks alone."""
    over = split.get(axis.removesuffix("/8"))
    if over and axis.endswith("/8") and length // BLOCK_BYTES % axis_size(mesh, over):
        return None
    return over


def row_shards(mesh: AnyMesh) -> int:
    """Parts that the rows of a batch are split into; their number must be a multiple of it."""
    return axis_size(mesh, "data") * axis_size(mesh, "fsdp")


@pytree_dataclass
class Gathered:
    """A kernel of one layer in its shards, which is gathered over fsdp when it multiplies.

    It is gathered again in the backward pass, so that no gathered kernel is kept until then.

    Attributes:
      kernel: an array `[i, o]` or a weight node.
      path: of the kernel in the params of the decoder.
    """

    kernel: Param
    path: str = static()

    @property
    def shape(self) -> Shape:
        """Shape `[i, o]` of the kernel."""
        return self.kernel.shape

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ kernel`."""
        # An array is rounded to the dtype of the product before it travels, not behind it.
        own = self.kernel if is_weight(self.kernel) else self.kernel.astype(x.dtype)
        return jax.checkpoint(lambda x, w: linear(x, gathered(self.path, w)))(x, own)

    def dense(self) -> Float[Array, "i o"]:
        """The matrix of the kernel."""
        return self.kernel.dense() if is_weight(self.kernel) else self.kernel


def gather_when_used(params: Params) -> Params:
    """Params of one layer with `Gathered` kernels where they lie on a mesh that has the axis fsdp;
    elsewhere the same params."""
    return map_leaves(
        lambda path, leaf: Gathered(leaf, path) if _over_fsdp(path, leaf) else leaf, params)


def gather_ends(params: Params) -> Params:
    """Params with embedding and head gathered over fsdp, for what multiplies by them many times."""
    ends = {name: part for name, part in params.items() if name in ("embed", "head")}
    return {**params, **map_leaves(gathered, ends)}


def gathered(path: str, leaf: Array | Weight) -> Array | Weight:
    """A kernel that is whole over fsdp and still split over tensor; its gradient is scattered.

    Where the kernel is not traced, lies on no mesh with that axis, or is no kernel of a decoder,
    it stays as it is.
    """
    if not _over_fsdp(path, leaf):
        return leaf
    mesh, axes = mesh_of(leaf), kernel_axes(path)
    parts = _shardings_of(leaf, axes, mesh)
    whole = _shardings_of(leaf, (axes[0] if axes[0] != "fsdp" else None,
                                 axes[1] if axes[1] != "fsdp" else None), mesh)
    arrays, structure = jax.tree.flatten(leaf)
    places = zip(arrays, structure.flatten_up_to(whole), structure.flatten_up_to(parts),
                 strict=True)
    return structure.unflatten([a if to is None or to == back else _gather(a, to, back)
                                for a, to, back in places])


def mesh_of(leaf: Param) -> AbstractMesh:
    """The mesh that a traced array or weight node lies on, by its type; one without axes for none.
    """
    return jax.typeof(jax.tree.leaves(leaf)[0]).sharding.mesh


def split_rows(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Activations that stay split by rows, where they are traced on a mesh with the axis fsdp.

    The partitioner may else split them like the kernels, along features.
    """
    mesh = mesh_of(x) if isinstance(x, Tracer) else None
    if mesh is None or axis_size(mesh, "fsdp") == 1 or x.shape[0] % row_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS)))


def _over_fsdp(path: str, leaf: Param) -> bool:
    arrays = jax.tree.leaves(leaf)
    return (bool(arrays) and isinstance(arrays[0], Tracer) and "fsdp" in kernel_axes(path)
            and axis_size(mesh_of(leaf), "fsdp") > 1)


def _shardings_of(leaf: Param, axes: Axes, mesh: AnyMesh) -> PyTree:
    """Shardings of an array or node. Of a node that only measures (it has no roles) those of the
    kernels in it; its other arrays have None, and are left to the partitioner."""
    if not is_weight(leaf):
        return _sharding(axes, leaf.shape, mesh)
    if hasattr(leaf, "roles"):
        return weight_shardings(leaf, axes, mesh)

    def inner(part: Param) -> PyTree[NamedSharding]:
        if is_weight(part) or getattr(part, "shape", None) == leaf.shape:
            return _shardings_of(part, axes, mesh)
        return None

    return jax.tree.map(inner, leaf, is_leaf=lambda part: part is not leaf and is_weight(part))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_float(x, whole, parts):
    return jax.lax.with_sharding_constraint(x, whole)


def _scatter(whole, parts, _, dx):
    # Both constraints: with the second alone the partitioner may gather activations instead.
    dx = jax.lax.with_sharding_constraint(dx, whole)
    return (jax.lax.with_sharding_constraint(dx, parts),)


_gather_float.defvjp(
    lambda x, whole, parts: (_gather_float(x, whole, parts), None), _scatter
)


def _gather(x: Array, whole: NamedSharding, parts: NamedSharding) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _gather_float(x, whole, parts)
    return jax.lax.with_sharding_constraint(x, whole)
