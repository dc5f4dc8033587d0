"""`Table`: an embedding as a weight node, looked up row by row and read as a head's kernel."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Float, Int

from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Weight
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import Header, ReadPart, WeightNode, columns, part
from rabit_jax.weights.product import product


@pytree_dataclass
class Table(WeightNode):
    """An embedding `E = W_hat^T`, `[v, d]`, kept as the kernel `W_hat: [d, v]` of a head.

    In that orientation each token is an output: scales and levels belong to one token, or to a
    group of its features, and the packed bits of a token lie in rows of their own. So a lookup
    reads and unpacks the rows of its tokens alone, and a tied head is `table.T`.

    Attributes:
      matrix: a weight node `[..., d, v]`, trained or packed.

    Example:
      >>> table = Table(GroupUniformSpec(bits=8, group=0).init(embedding.T))
      >>> table.lookup(tokens).shape       # tokens: [b, t]
      (2, 5, 64)
    """

    matrix: Weight = part()

    header_type = "table"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., v, d]` of the embedding."""
        *lead, d, v = self.matrix.shape
        return (*lead, v, d)

    @property
    def k(self) -> int | None:
        """Paths of the matrix; None where it has no fixed number."""
        return getattr(self.matrix, "k", None)

    @property
    def T(self) -> Weight:  # noqa: N802  (the name that arrays have for it)
        """The kernel `[..., d, v]` of a head that is tied to this embedding."""
        return self.matrix

    def lookup(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """`E[tokens]` in float32; a token without a row reads NaN.

        The arrays of the matrix are gathered along its outputs and only what was gathered is
        unpacked. Representations whose arrays cannot be gathered so (low-rank factors, which are
        packed along the outputs) are unpacked whole.
        """
        found = columns(self.matrix, tokens.reshape(-1))
        if found is None:
            return jnp.take(self.dense(), tokens, axis=0)
        rows = jnp.swapaxes(found.dense(), -1, -2)
        rows = rows.reshape(*tokens.shape, rows.shape[-1])
        return jnp.where((tokens < self.shape[-2])[..., None], rows, jnp.nan)

    def matmul(self, x: Float[Array, "... v"]) -> Float[Array, "... d"]:
        """`x @ E`, `[..., v]` -> `[..., d]` in `x.dtype`."""
        return product(x, self.dense())

    def dense(self) -> Float[Array, "... v d"]:
        """`E`, float32 `[..., v, d]`."""
        return jnp.swapaxes(self.matrix.dense(), -1, -2)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """The paths of the matrix, each as `[..., v, d]`."""
        return (jnp.swapaxes(path, -1, -2) for path in self.matrix.paths())

    def pack(self, name: str) -> Table:
        """The table of the packed matrix; what raises is the matrix's."""
        return self.replace(matrix=self.matrix.pack(name))

    def cost(self) -> Cost:
        """Cost per token of the matrix as a head, a `weights.cost.Cost`; a lookup costs one row."""
        return self.matrix.cost()

    @classmethod
    def abstract(cls, header: Header, read: ReadPart | None = None) -> Table:
        """The packed node of one embedding as shapes and dtypes, from its `header`."""
        if read is None:
            raise ValueError("the matrix of a table needs a reader")
        node = cls(read(header["matrix"]))
        if node.shape != (header["in"], header["out"]):
            raise ValueError(f"a table {header['in'], header['out']} of a matrix "
                             f"{node.matrix.shape}")
        return node


def is_table(path: str) -> bool:
    """Whether the parameter at `path` is an embedding: Flax calls it `embedding`."""
    return path.rpartition("/")[2] == "embedding"
