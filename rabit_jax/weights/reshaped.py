"""`Reshaped`: a weight whose kernel has several input or output axes, as `nn.DenseGeneral` has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Json, Shape, Weight
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import Header, ReadPart, WeightNode, part, static


@pytree_dataclass
class Reshaped(WeightNode):
    """A matrix `[..., i, o]` in the shape `[..., *inputs, *outputs]` of its layer's kernel.

    An attention layer keeps its query as `[d, heads, head_dim]` and its output as
    `[heads, head_dim, d]`; both are one matrix, and its bits and scales are those of the matrix.

    Attributes:
      matrix: a weight node `[..., i, o]`, trained or packed.
      inputs: input axes, `prod(inputs) = i`.
      outputs: output axes, `prod(outputs) = o`.

    Example:
      >>> node = Reshaped(ResidualSignSpec(k=2).init(w.reshape(64, 64)), (64,), (4, 16))
      >>> node.dense().shape
      (64, 4, 16)
    """

    matrix: Any = part()
    inputs: Shape = static()
    outputs: Shape = static()

    header_type = "reshaped"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., *inputs, *outputs]` of the kernel."""
        return (*self.matrix.shape[:-2], *self.inputs, *self.outputs)

    @property
    def k(self) -> int | None:
        """Paths of the matrix; None where it has no fixed number."""
        return getattr(self.matrix, "k", None)

    @property
    def positive(self) -> Callable[[], Array]:
        """That of the matrix, in its shape; no attribute where the matrix has no signs."""
        return self.matrix.positive

    @property
    def terms(self) -> tuple[Weight, ...]:
        """Those of the matrix; no attribute where it is no sum."""
        return self.matrix.terms

    def matmul(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """`[..., *inputs]` -> `[..., *outputs]` in `x.dtype`."""
        lead = x.shape[: x.ndim - len(self.inputs)]
        y = self.matrix.matmul(x.reshape(*lead, prod(self.inputs)))
        return y.reshape(*lead, *self.outputs)

    def dense(self) -> Float[Array, ...]:
        """The kernel, float32 `[..., *inputs, *outputs]`."""
        return self.matrix.dense().reshape(self.shape)

    def paths(self) -> Iterator[Float[Array, ...]]:
        """The paths of the matrix, each in the shape of the kernel."""
        return (path.reshape(self.shape) for path in self.matrix.paths())

    def pack(self, name: str) -> Reshaped:
        """The packed matrix in the same shape; what raises is the matrix's."""
        return self.replace(matrix=self.matrix.pack(name))

    def cost(self) -> Cost:
        """Cost per token of the matrix, a `weights.cost.Cost`."""
        return self.matrix.cost()

    def header(self) -> Json:
        """What a packed file says of one kernel: its axes and the header of its matrix."""
        i, o = self.matrix.shape[-2:]
        axes = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        return {"type": "reshaped", "in": i, "out": o, **axes, "matrix": self.matrix.header()}

    @classmethod
    def abstract(cls, header: Header, read: ReadPart | None = None) -> Reshaped:
        """The packed node of one kernel as shapes and dtypes, from its `header`."""
        inputs, outputs = (tuple(map(int, header[name])) for name in ("inputs", "outputs"))
        if read is None:
            raise ValueError("the matrix of a reshaped weight needs a reader")
        matrix = read(header["matrix"])
        if matrix.shape != (prod(inputs), prod(outputs)):
            raise ValueError(f"axes {inputs} and {outputs} of a matrix {matrix.shape}")
        return cls(matrix, inputs, outputs)



def matrix_shape(path: str, shape: tuple[int, ...], stats: Stats | None) -> tuple[int, ...]:
    """`[..., i, o]` of a kernel of that shape: the statistics tell which axes are inputs.

    Without statistics the last two axes are the matrix, and those before them stacked layers.

    Raises:
      BadInput: no such split of the axes; the statistics are those of another model.
    """
    if stats is None:
        return shape
    matrix = (*stats.s_in.shape, stats.s_out.shape[-1])
    if shape != matrix and split_axes(shape, matrix) is None:
        raise BadInput(
            f"the statistics of {path} are those of a matrix {list(matrix)}, its kernel is "
            f"{list(shape)}: calibrate the model that is converted"
        )
    return matrix


def in_shape(node: Weight, shape: Shape) -> Weight:
    """The node of a matrix `[..., i, o]` as one of a kernel of that shape."""
    sides = None if node.shape == shape else split_axes(shape, node.shape)
    return node if sides is None else Reshaped(node, *sides)


def split_axes(shape: tuple[int, ...], matrix: tuple[int, ...]) -> tuple | None:
    """`(inputs, outputs)` of a kernel `[..., *inputs, *outputs]` that is a matrix `[..., i, o]`.

    None where there is no such split.
    """
    *lead, i, o = matrix
    own = shape[len(lead) :]
    splits = ((own[:n], own[n:]) for n in range(1, len(own)))
    fits = (s for s in splits if (prod(s[0]), prod(s[1])) == (i, o))
    return next(fits, None) if tuple(lead) == shape[: len(lead)] else None
