"""The named types of the package's signatures, and the two protocols: a weight and its spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Float, PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Array: TypeAlias = jax.Array
Shape: TypeAlias = tuple[int, ...]
Tokens: TypeAlias = jax.Array  # int32 `[b, t]`
Params: TypeAlias = dict[str, Any]  # nested dicts whose leaves are arrays and weight nodes
Batch: TypeAlias = dict[str, Array]  # `tokens: [b, t]` int32, often `mask: [b, t]` bool
Param: TypeAlias = "Array | Weight"  # a leaf of such a tree
Device: TypeAlias = Any  # a `jax.Device`, which is no class to type checkers
Json: TypeAlias = dict[str, Any]  # a JSON object
Tokenizer: TypeAlias = "PreTrainedTokenizerFast"


@runtime_checkable
class Weight(Protocol):
    """A matrix `[..., i, o]` in some representation; a `flax.struct` dataclass whose leaves are
    arrays.

    `weights.leaves.WeightNode` derives most of it from the declared axes of the arrays.
    Leading axes are stacked layers. `shape` is that of the dense matrix.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix that the node stands for."""
        ...

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat` for `x: [..., i]`, giving `[..., o]` in `x.dtype`; no leading weight axes."""
        ...

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32, exactly what the deployed model multiplies by."""
        ...

    def paths(self) -> Iterator[Array]:
        """The terms `W_hat_1, ..., W_hat_k` of `W_hat`, each `[..., i, o]`, one at a time."""
        ...

    def roles(self) -> PyTree[str]:
        """The same node with each leaf named for the optimiser and the mesh.

        "latent": a large trainable array; "scale": a small one, kept positive; "level": a small one
        of either sign; "sign" and "code": bits and integers, which no training changes.
        """
        ...

    def pack(self, name: str) -> Weight:
        """The deployed form, itself a weight; `name` opens the message of what cannot be packed."""
        ...

    def bits_per_weight(self) -> float:
        """Bits per weight once packed, all scales, levels and tables counted, padding not."""
        ...

    def deployed_bytes(self) -> int:
        """Bytes of all arrays once packed, padding included; from the shapes alone."""
        ...

    def cost(self) -> Any:
        """Operations and bytes per token once packed, a `weights.costs.Cost`; from the shapes."""
        ...


@runtime_checkable
class Spec(Protocol):
    """How one kernel becomes a weight node: a frozen dataclass of settings."""

    def init(
        self, w: Float[Array, "... i o"], stats: Any = None, key: Array | None = None
    ) -> Weight:
        """Kernel `[..., i, o]`, calibration statistics, PRNG key -> a trainable weight node."""
        ...

    def dense(self, node: Any) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32 of a node that this spec made."""
        ...
