"""`Codebook`: residual vector quantisation, a sum of vectors read from small tables."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from flax import struct

from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.cost import Cost
from rabit_jax.weights.packed_codebook import (
    PackedCodebook,
    code_bits,
    codebook_bits,
    codebook_cost,
    codebook_size,
    codebook_terms,
)
from rabit_jax.weights.packed_groups import pack_codes, to_half


@struct.dataclass
class Codebook:
    """`W_hat[i, o] = g[o] sum_s C_s[code_s[i // d, o], i mod d]`: d inputs share a code.

    The codes are fixed; what trains is the tables and the output scales, whose gradients are exact.

    Attributes:
      codes: uint8 `[..., stages, m, o]`, `m = ceil(i / d)`; no training changes them.
      codebooks: float32 `[..., stages, entries, d]`.
      g: float32 `[..., o]` output scales ("row scale").
      inputs: `i`; where d does not divide it the last vectors are cut.

    Example:
      >>> node = CodebookSpec(stages=2, dim=4, bits=4).init(w)      # w: [..., i, o]
      >>> y = linear(x, node)      # [..., i] -> [..., o]
    """

    codes: jax.Array
    codebooks: jax.Array
    g: jax.Array
    inputs: int = struct.field(pytree_node=False)

    @property
    def k(self) -> int:
        """Number of stages."""
        return self.codebooks.shape[-3]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.g.shape[:-1], self.inputs, self.g.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`; `W_hat` is summed in float32 and rounded once to `x.dtype`."""
        return x @ self.dense().astype(x.dtype)

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`; differentiable in `codebooks` and `g`."""
        return self.g[..., None, :] * sum(self._terms())

    def paths(self) -> Iterator[jax.Array]:
        """What each stage adds, `g C_s`, float32 `[..., i, o]`."""
        return (self.g[..., None, :] * term for term in self._terms())

    def roles(self) -> Codebook:
        """Leaf names for the optimiser and the mesh."""
        return self.replace(codes="code", codebooks="level", g="scale")

    def pack(self, name: str) -> PackedCodebook:
        """Pack the codes with `log2(entries)` bits each, round tables and scales to 16 bits.

        Raises:
          BadInput: an entry or a scale leaves the float16 range; the message begins with `name`.
        """
        books = to_half(self.codebooks, "codebooks", name)
        g = to_half(self.g, "g", name, scale=True)
        bits = code_bits(self.codebooks.shape[-2])
        planes = per_layer(lambda codes: pack_codes(codes, bits), self.codes)
        return PackedCodebook(planes, books, g, self.inputs)

    def bits_per_weight(self) -> float:
        """Nominal `(stages bits m o + 16 stages entries d + 16 o) / (i o)` once packed."""
        return codebook_bits(self.shape, self.codebooks.shape[-3:])

    def deployed_bytes(self) -> int:
        """Bytes once packed, padding of the codes to 256 included."""
        return codebook_size(self.shape, self.codebooks.shape[-3:])

    def cost(self) -> Cost:
        """Cost per token once packed, see `packed_codebook.codebook_cost`."""
        return codebook_cost(self.shape, self.codebooks.shape[-3:])

    def _terms(self) -> Iterator[jax.Array]:
        return codebook_terms(self.codes, self.codebooks, self.inputs)
