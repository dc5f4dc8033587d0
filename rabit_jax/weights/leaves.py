"""Weight nodes, whose arrays are declared once with role and axes, and what follows from that.

    class ResidualSign(WeightNode):
        latent: Array = leaf("latent", "i o")
        g: Array = leaf("scale", "k o")
        h: Array = leaf("scale", "k i")

The roles group arrays for the optimiser, the axes place them on a mesh, and the axes of the packed
form give its shapes from a header, its bytes and its bits per weight; `axes` has their notation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.core.meta import AxisMetadata
from jaxtyping import Float, Int, PyTree

from rabit_jax.errors import BadInput, check_choice
from rabit_jax.signs.ste import summed
from rabit_jax.tree import is_weight
from rabit_jax.types import Array, Json, Shape, Weight
from rabit_jax.weights.axes import Leaf, Role, Sizes
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.product import product

Node = TypeVar("Node", bound="WeightNode")
Header = Mapping[str, Any]
ReadPart = Callable[[Header], "WeightNode"]  # makes the node of a part from its header


def leaf(role: Role, axes: str) -> Any:
    """A field of a weight node that holds an array, see `Leaf`."""
    return struct.field(metadata={"leaf": Leaf(role, axes)})


def size(axis: str, **default: int) -> Any:
    """A static field of a weight node that holds the size of an axis which no array has."""
    return struct.field(pytree_node=False, metadata={"axis": axis}, **default)


def static() -> Any:
    """A static field of a weight node that is no size of an axis."""
    return struct.field(pytree_node=False)


def choice(default: str, choices: Callable[[], tuple[str, ...]]) -> Any:
    """A static field of a weight node that is one of the names that `choices()` returns; any other
    is a BadInput."""
    return struct.field(pytree_node=False, default=default, metadata={"choices": choices})


def part(many: bool = False) -> Any:
    """A field of a weight node that holds another, or a tuple of `many`."""
    return struct.field(metadata={"many": many})


class WeightNode(AxisMetadata[Array]):
    """Base of weight nodes, `pytree_dataclass`es whose arrays are declared by `leaf`.

    Other fields are static, or hold weight nodes and are declared by `part`. Shapes, sizes, roles
    and headers read the declaration alone, so they work on abstract arrays too.

    To Flax a node is a box around `W_hat`: a Linen layer that asks for its parameter gets what
    `unbox` returns, an NNX layer what `node[...]` returns, so an ordinary layer multiplies by
    `dense()` of its own node, and its gradient is that of `dense()`.

    Attributes:
      packed: class of the deployed form; None for the class itself.
      header_type: of a packed class, the `type` of its header.
      header_sizes: of a packed class, the axes whose sizes its header holds, by name and in order.
      paths_of: name of the part whose sign paths are those of the node; "" where they are its own.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]
    packed: ClassVar[type[WeightNode] | None] = None
    header_type: ClassVar[str] = ""
    header_sizes: ClassVar[Mapping[str, str]] = {}
    paths_of: ClassVar[str] = ""

    def __post_init__(self):
        """Raises BadInput for a field that is none of its choices."""
        for field in _fields(self):
            if "choices" in field.metadata:
                check_choice(field.name, getattr(self, field.name), field.metadata["choices"]())

    def replace(self, **changes: object) -> Self:
        """The node with other values in some fields."""
        return dataclasses.replace(self, **changes)

    def __jax_array__(self) -> Array:
        """A weight node is no array; JAX calls this where one is used as if it were.

        Raises:
          BadInput: always, with what to do.
        """
        raise BadInput(f"a {type(self).__name__} is no array, and the model multiplies by arrays: "
                       'apply it to dense params, model.apply({"params": dense(params)}, ...)')

    def unbox(self) -> Float[Array, "... i o"]:
        """`dense()`, which a Linen layer gets for its parameter."""
        return self.dense()

    def __getitem__(self, index: object) -> Array:
        """`node[...]` is `dense()`, as an NNX layer reads its variable.

        Raises:
          BadInput: any other index.
        """
        if index is Ellipsis:
            return self.dense()
        raise BadInput(f"a {type(self).__name__} is no array and has no parts to index: index its "
                       "matrix, node.dense()[...]")

    def replace_boxed(self, val: object) -> Self:
        """Raises BadInput: no layer writes a matrix into a weight node."""
        raise BadInput(f"a {type(self).__name__} takes no other matrix: convert the model again")

    def add_axis(self, index: int, params: dict) -> Self:
        """Itself, whose arrays a lifted transformation has stacked along axis `index`.

        Raises:
          BadInput: another axis than the first, which no weight node stacks layers along.
        """
        if index:
            raise BadInput(f"layers with a {type(self).__name__} are stacked along axis {index}, "
                           "wanted the first: variable_axes={'params': 0}")
        return self

    def remove_axis(self, index: int, params: dict) -> Self:
        """Itself, of whose arrays a lifted transformation has taken one layer; raises as
        `add_axis`."""
        return self.add_axis(index, params)

    @property
    def shape(self) -> Shape:
        """Shape `[..., i, o]` of the matrix."""
        sizes = self.sizes()
        return (*self.lead(), sizes["i"], sizes["o"])

    def lead(self) -> Shape:
        """Sizes of the axes of stacked layers."""
        array, declared = next(_arrays(self))
        return tuple(array.shape[: array.ndim - len(declared.names)])

    def sizes(self) -> Sizes:
        """Sizes of the named axes, read from arrays and static fields."""
        found: Sizes = {}
        for array, declared in _arrays(self):
            names = declared.names
            found |= dict(zip(names, array.shape[array.ndim - len(names) :], strict=True))
        for field in _fields(self):
            if "axis" in field.metadata:
                found[field.metadata["axis"]] = getattr(self, field.name)
        tables = {a.removeprefix("2^"): n for a, n in found.items() if a.startswith("2^")}
        return {axis: (n - 1).bit_length() for axis, n in tables.items()} | found

    def layer_sizes(self) -> list[Sizes]:
        """`sizes()` of the matrix of each layer; those of stacked layers may differ in k."""
        return [self.sizes()] * prod(self.lead())

    def paths(self) -> Iterator[Array]:
        """The terms `W_hat_1, ..., W_hat_k` of `W_hat`, float32 `[..., i, o]`, one at a time."""
        raise NotImplementedError(f"{type(self).__name__} does not name its paths")

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return summed(self.paths())

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return product(x, self.dense())

    def pack(self, name: str) -> WeightNode:
        """Itself, which a packed weight is; trained weights have a `pack` of their own."""
        return self

    def roles(self) -> PyTree[str]:
        """The same node with the role of each array in its place."""
        return jax.tree.map(lambda one: one.role, declaration(self))

    def deployed_bytes(self) -> int:
        """Bytes of all arrays in a packed file, padding included; from the shapes alone."""
        stored = _packed_leaves(self)
        layers = self.layer_sizes() if stored else []
        total = sum(one.stored_bytes(sizes) for sizes in layers for one in stored)
        return total + sum(part.deployed_bytes() for part in parts(self))

    def bits_per_weight(self) -> float:
        """Bits per weight once packed, all scales, levels and tables counted, padding not."""
        stored = _packed_leaves(self)
        layers = self.layer_sizes() if stored else []
        bits = sum(one.packed_bits(sizes) for sizes in layers for one in stored)
        own = bits / prod(self.shape) if stored else 0
        return own + sum(part.bits_per_weight() for part in parts(self))

    def cost(self) -> Cost:
        """Operations and bytes per token once packed, from the shapes alone."""
        raise NotImplementedError(f"{type(self).__name__} does not count its cost")

    def header(self) -> Json:
        """What a packed file says of one matrix: its type, its sizes and its parts' headers."""
        i, o = self.shape[-2:]
        sizes = self.sizes() if self.header_sizes else {}
        own = {name: sizes[axis] for name, axis in self.header_sizes.items()}
        held = {
            f.name: jax.tree.map(lambda part: part.header(), _listed(getattr(self, f.name)),
                                 is_leaf=is_weight)
            for f in _fields(self) if _holds_parts(f)
        }
        return {"type": self.header_type, "in": i, "out": o, **own, **held}

    @classmethod
    def abstract(cls, header: Header, read: ReadPart | None = None) -> Self:
        """The packed node of one matrix as shapes and dtypes, from its `header`.

        Args:
          header: what `header()` returned, possibly through JSON.
          read: makes the node of a part from the part's header; for weights that have parts.

        Raises:
          KeyError, TypeError, ValueError: the header lacks a field, or holds one of no sense.
        """
        named = {"in": "i", "out": "o"} | dict(cls.header_sizes)
        sizes = {axis: _checked_size(name, header[name]) for name, axis in named.items()}
        values: dict[str, object] = {}
        for field in _fields(cls):
            if "leaf" in field.metadata:
                values[field.name] = field.metadata["leaf"].outline(sizes)
            elif "axis" in field.metadata:
                values[field.name] = sizes[field.metadata["axis"]]
            elif _holds_parts(field):
                values[field.name] = _read_parts(field, header[field.name], read)
        node = cls(**values)
        for one in (node, *parts(node)):
            if one.shape != (sizes["i"], sizes["o"]):
                raise ValueError(f"a part of shape {one.shape} in {sizes['i'], sizes['o']}")
        return node


def declaration(node: Weight) -> PyTree[Leaf]:
    """The node with its `Leaf` in place of each array, those of its parts included.

    A weight that is no `WeightNode` names its roles by a method of its own, and has no axes.

    Raises:
      BadInput: an array that the class of the node does not declare.
    """
    if not isinstance(node, WeightNode):
        return jax.tree.map(lambda role: Leaf(role, ""), node.roles())
    found = {
        f.name: _declared(node, f) for f in _fields(node)
        if f.metadata.get("pytree_node", True) and getattr(node, f.name) is not None
    }
    return node.replace(**found)


def leaf_axes(node: WeightNode) -> list[tuple[str, list[str]]]:
    """The fields of a node that hold arrays, and the names of their axes behind those of layers."""
    return [(field.name, field.metadata["leaf"].names)
            for field in _fields(node) if "leaf" in field.metadata]


def row_signs(node: Weight) -> PyTree[int]:
    """The node with the number of signs of a packed row in place of each array, 0 where an array is
    not packed; the sizes are those of the node and of its parts."""
    if not isinstance(node, WeightNode):
        return jax.tree.map(lambda _: 0, node)
    sizes = node.sizes()
    found = {}
    for field in _fields(node):
        held = getattr(node, field.name)
        if "leaf" in field.metadata and held is not None:
            found[field.name] = field.metadata["leaf"].row_signs(sizes)
        elif _holds_parts(field):
            found[field.name] = jax.tree.map(row_signs, held, is_leaf=is_weight)
    return node.replace(**found)


def columns(node: Weight, index: Int[Array, " n"]) -> WeightNode | None:
    """The node of some columns `W_hat[:, index]`: its arrays gathered along their axis o.

    Args:
      node: a weight `[i, o]`, trained or packed.
      index: int `[n]` below o.

    Returns:
      A node `[i, n]`; None where an array holds the outputs in another form, such as packed.
    """
    if not isinstance(node, WeightNode):
        return None
    found: dict[str, object] = {}
    for field in _fields(node):
        held = getattr(node, field.name)
        if "leaf" in field.metadata and held is not None:
            names = field.metadata["leaf"].names
            if any(_outputs(name) for name in names if name != "o"):
                return None
            if "o" in names:
                axis = held.ndim - len(names) + names.index("o")
                found[field.name] = jnp.take(held, index, axis=axis)
        elif _holds_parts(field):
            own = jax.tree.map(lambda one: columns(one, index), held, is_leaf=is_weight)
            if any(one is None for one in jax.tree.leaves(own, is_leaf=_none_or_weight)):
                return None
            found[field.name] = own
    return node.replace(**found)


def _outputs(axis: str) -> bool:
    """Whether an axis of this module's notation is made of the outputs."""
    return axis.removesuffix("/8").split("//")[0] == "o"


def _none_or_weight(held: object) -> bool:
    return held is None or is_weight(held)


def _declared(node: WeightNode, field: dataclasses.Field) -> PyTree[Leaf]:
    if "leaf" in field.metadata:
        return field.metadata["leaf"]
    if not _holds_parts(field):
        raise BadInput(
            f"{type(node).__name__}.{field.name} is an array of unknown role and axes: declare it, "
            f'such as {field.name}: Array = leaf("latent", "i o")'
        )
    return jax.tree.map(declaration, getattr(node, field.name), is_leaf=is_weight)


def parts(node: WeightNode) -> list[WeightNode]:
    """The weight nodes that a weight node is made of: the terms of a sum, for example."""
    held = [getattr(node, field.name) for field in _fields(node) if _holds_parts(field)]
    return jax.tree.leaves(held, is_leaf=is_weight)


def _fields(node: WeightNode | type[WeightNode]) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(node)


def _holds_parts(field: dataclasses.Field) -> bool:
    return "many" in field.metadata


def _read_parts(
    field: dataclasses.Field, held: Header | list[Header], read: ReadPart | None
) -> WeightNode | tuple[WeightNode, ...]:
    if read is None or isinstance(held, list) != field.metadata["many"]:
        raise ValueError(f"{field.name} is {held!r}")
    return tuple(map(read, held)) if isinstance(held, list) else read(held)


def _arrays(node: WeightNode) -> Iterator[tuple[Array, Leaf]]:
    """The declared arrays of a node; None, where a tree was partitioned, is left out."""
    for field in _fields(node):
        if "leaf" in field.metadata and getattr(node, field.name) is not None:
            yield getattr(node, field.name), field.metadata["leaf"]


def _packed_leaves(node: WeightNode) -> list[Leaf]:
    fields = _fields(node.packed or node)
    return [field.metadata["leaf"] for field in fields if "leaf" in field.metadata]


def _listed(held: PyTree[WeightNode]) -> PyTree[WeightNode]:
    return list(held) if isinstance(held, tuple) else held


def _checked_size(name: str, found: object) -> int:
    if type(found) is not int or found < 1:
        raise ValueError(f"{name} is {found!r}")
    return found
