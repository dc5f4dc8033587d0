"""`describe`: what a params tree holds, in bits and bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rabit_jax.kernels.cpu.library import status
from rabit_jax.tree import is_weight, leaves, tree_bytes
from rabit_jax.types import Param
from rabit_jax.weights.conversion import LLAMA_ENDS


@dataclass(frozen=True)
class Row:
    """One parameter: its path, representation, dense shape, and sizes.

    `bits_per_weight` is nominal, `stored_bits_per_weight` counts padding; `trained_bytes` is what
    the leaves hold now, `deployed_bytes` what the packed file stores (arrays: 2 bytes an element).
    """

    path: str
    representation: str
    shape: tuple[int, ...]
    k: int | None
    bits_per_weight: float
    stored_bits_per_weight: float
    trained_bytes: int
    deployed_bytes: int


@dataclass(frozen=True)
class Description:
    """Rows and totals of a params tree; printing it shows the table."""

    rows: tuple[Row, ...]

    @property
    def quantised(self) -> tuple[Row, ...]:
        """The rows that are weight nodes, without embedding and head where there are others.

        Those are counted in the figures of the whole model, so that bits per weight are those of
        the blocks whatever the embedding is stored in.
        """
        found = tuple(row for row in self.rows if row.representation != "array")
        blocks = tuple(row for row in found if not re.fullmatch(LLAMA_ENDS, row.path))
        return blocks or found

    @property
    def bits_per_weight(self) -> float:
        """Nominal bits per weight over `quantised`, weighted by their sizes."""
        return _mean(self.quantised, "bits_per_weight")

    @property
    def stored_bits_per_weight(self) -> float:
        """Bits per weight over `quantised` with the padding of the file."""
        return _mean(self.quantised, "stored_bits_per_weight")

    @property
    def whole_model_bits_per_weight(self) -> float:
        """`8 deployed_bytes / parameters`, embedding, norms and head included.

        What a packed file's tensors hold (`formats.packed_model.packed_bytes`), without its header.
        """
        count = sum(prod(row.shape) for row in self.rows)
        return 8 * self.deployed_bytes / count if count else float("nan")

    @property
    def whole_model_ratio(self) -> float:
        """How many times smaller the deployed model is than the same one in bfloat16."""
        return 16 / self.whole_model_bits_per_weight

    @property
    def size(self) -> str:
        """Stored bits of the quantised matrices and of the whole model, in one line."""
        whole = (f"{self.whole_model_bits_per_weight:.3f} over the whole model, "
                 f"{self.whole_model_ratio:.2f} times smaller than bfloat16")
        return f"{self.stored_bits_per_weight:.3f} in the quantised matrices, {whole}" \
            if self.quantised else whole

    @property
    def trained_bytes(self) -> int:
        """Bytes of all leaves as they are."""
        return sum(row.trained_bytes for row in self.rows)

    @property
    def deployed_bytes(self) -> int:
        """Bytes of the deployed model, what is not quantised in 16 bits."""
        return sum(row.deployed_bytes for row in self.rows)

    def __str__(self) -> str:
        """The table as text; its bits per weight are those stored, with the padding."""
        wide = max([14, *(len(r.representation) for r in self.rows)])
        long = max([32, *(len(r.path) for r in self.rows)])
        head = (
            f"{'path':{long}} {'representation':{wide}} {'shape':18} {'k':>2} {'bits/w':>7} "
            f"{'trained':>9} {'deployed':>9}"
        )
        body = [
            f"{r.path:{long}} {r.representation:{wide}} {str(list(r.shape)):18} {r.k or '-':>2} "
            f"{r.stored_bits_per_weight:7.3f} {_size(r.trained_bytes):>9} "
            f"{_size(r.deployed_bytes):>9}"
            for r in self.rows
        ]
        average = f"{self.stored_bits_per_weight:.3f}" if self.quantised else ""
        total = (
            f"{'total':{long}} {'':{wide}} {'':18} {'':>2} {average:>7} "
            f"{_size(self.trained_bytes):>9} {_size(self.deployed_bytes):>9}"
        )
        lines = [head, *body, total, f"bits per weight: {self.size}"]
        if any(r.representation.startswith("Packed") for r in self.rows) and on_cpu():
            lines.append(f"packed products on this CPU: {status()}")
        return "\n".join(lines)


def on_cpu() -> bool:
    """Whether JAX's first device is a CPU."""
    return jax.default_backend() == "cpu"


def _mean(rows: tuple[Row, ...], field: str) -> float:
    total = sum(prod(row.shape) for row in rows)
    return (
        sum(getattr(row, field) * prod(row.shape) for row in rows) / total
        if total
        else float("nan")
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.3g} GB"


def describe(params: PyTree) -> Description:
    """Path, representation, shape, k, bits per weight and bytes of every parameter.

    Args:
      params: tree of arrays and weight nodes; abstract shapes (`jax.eval_shape`) will do.

    Returns:
      A `Description`; `print` it, or read `rows`, `bits_per_weight`, `deployed_bytes`.
    """
    return Description(tuple(_row(path, leaf) for path, leaf in leaves(params)))


def _row(path: str, leaf: Param) -> Row:
    size = prod(leaf.shape)
    trained = tree_bytes(leaf)
    if not is_weight(leaf):
        return Row(
            path,
            "array",
            leaf.shape,
            None,
            8.0 * jnp.dtype(leaf.dtype).itemsize,
            16.0,
            trained,
            2 * size,
        )
    stored = leaf.deployed_bytes()
    return Row(
        path,
        # The shape shows a kernel of several axes: what matters is how its matrix is stored.
        type(getattr(leaf, "matrix", leaf)).__name__,
        leaf.shape,
        getattr(leaf, "k", None),
        leaf.bits_per_weight(),
        8 * stored / size,
        trained,
        stored,
    )
