"""`Codebook`: residual vector quantisation, a sum of vectors read from small tables."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from flax import struct

from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.packed_codebook import (
    CodebookSum,
    PackedCodebook,
    code_bits,
    codebook_terms,
)
from rabit_jax.weights.packed_groups import pack_codes, to_half


@struct.dataclass
class Codebook(CodebookSum):
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

    def _terms(self) -> Iterator[jax.Array]:
        return codebook_terms(self.codes, self.codebooks, self.inputs)
