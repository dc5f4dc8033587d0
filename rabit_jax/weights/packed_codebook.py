"""`PackedCodebook`: the deployed form of residual vector quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rabit_jax.weights.cost import Cost
from rabit_jax.weights.packed import SCALE_DTYPE
from rabit_jax.weights.packed_groups import abstract_planes, unpack_codes
from rabit_jax.weights.ste import F32


class CodebookSum:
    """Mixin of weights with `codebooks: [..., stages, entries, d]`, `g: [..., o]` and `inputs`.

    Trained or packed, sizes and costs are those of the packed form.
    """

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
        return self.g[..., None, :].astype(F32) * sum(self._terms())

    def paths(self) -> Iterator[jax.Array]:
        """What each stage adds, `g C_s`, float32 `[..., i, o]`."""
        return (self.g[..., None, :].astype(F32) * term for term in self._terms())

    def bits_per_weight(self) -> float:
        """Nominal `(stages bits m o + 16 stages entries d + 16 o) / (i o)` once packed; padding on
        disk comes on top where 256 does not divide m."""
        i, o = self.shape[-2:]
        stages, entries, d = self.codebooks.shape[-3:]
        codes = stages * code_bits(entries) * vectors(i, d) * o
        return (codes + 16 * stages * entries * d + 16 * o) / (i * o)

    def deployed_bytes(self) -> int:
        """Bytes once packed, padding of the codes to 256 included."""
        from rabit_jax.kernels.layout import packed_bytes

        *lead, i, o = self.shape
        stages, entries, d = self.codebooks.shape[-3:]
        codes = stages * code_bits(entries) * o * packed_bytes(vectors(i, d))
        return prod(lead) * (codes + 2 * stages * entries * d + 2 * o)

    def cost(self) -> Cost:
        """Cost per token of decoding to weights and multiplying.

        Lookups: `stages m o` vectors. Additions: `(stages - 1) i o` join the stages, `i o` are
        those of the product. Multiplications: `i o` of the product and `o` by `g`.
        """
        *lead, i, o = self.shape
        stages, _, d = self.codebooks.shape[-3:]
        layers = prod(lead)
        lookups = layers * stages * vectors(i, d) * o
        return Cost(layers * (i + 1) * o, layers * stages * i * o, lookups, self.deployed_bytes())


@struct.dataclass
class PackedCodebook(CodebookSum):
    """`W_hat[i, o] = g[o] sum_s C_s[code_s[i // d, o], i mod d]` with the codes as bit planes.

    Attributes:
      bits: uint8 `[..., stages, bits, o, 32 ceil(m / 256)]`, `m = ceil(i / d)`; plane p holds bit p
        of the codes.
      codebooks: float16 `[..., stages, entries, d]`, `entries = 2^bits`.
      g: float16 `[..., o]` output scales ("row scale").
      inputs: `i`; where d does not divide it the last vectors are cut.
    """

    bits: jax.Array
    codebooks: jax.Array
    g: jax.Array
    inputs: int = struct.field(pytree_node=False)

    def codes(self) -> jax.Array:
        """uint8 `[..., stages, m, o]`."""
        return unpack_codes(self.bits, vectors(self.inputs, self.codebooks.shape[-1]))

    def roles(self) -> PackedCodebook:
        """Leaf names for the mesh."""
        return self.replace(bits="code", codebooks="level", g="scale")

    def pack(self, name: str) -> PackedCodebook:
        """Itself: already packed."""
        return self

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "codebook", "in", "out", "stages",
        "bits", "dim"}`."""
        i, o = self.shape[-2:]
        stages, entries, d = self.codebooks.shape[-3:]
        bits = code_bits(entries)
        return {"type": "codebook", "in": i, "out": o, "stages": stages, "bits": bits, "dim": d}

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> PackedCodebook:
        """The node of one matrix as shapes and dtypes, from its `header`."""
        i, o, d = header["in"], header["out"], header["dim"]
        stages, bits = header["stages"], header["bits"]
        books = jax.ShapeDtypeStruct((stages, 2**bits, d), SCALE_DTYPE)
        planes = abstract_planes((stages, bits), vectors(i, d), o)
        return cls(planes, books, jax.ShapeDtypeStruct((o,), SCALE_DTYPE), i)

    def _terms(self) -> Iterator[jax.Array]:
        return codebook_terms(self.codes(), self.codebooks.astype(F32), self.inputs)


def vectors(inputs: int, dim: int) -> int:
    """Vectors in a column of `inputs` weights: `m = ceil(i / d)`."""
    return -(-inputs // dim)


def code_bits(entries: int) -> int:
    """Bits of a code for `entries` entries."""
    return (entries - 1).bit_length()


def codebook_terms(codes: jax.Array, codebooks: jax.Array, inputs: int) -> Iterator[jax.Array]:
    """`C_s[code_s[i // d, o], i mod d]` for each stage, float32 `[..., i, o]`.

    `codes: [..., stages, m, o]` uint8, `codebooks: [..., stages, entries, d]` float32.
    """
    read = jnp.vectorize(lambda book, code: book[code], signature="(e,d),(m,o)->(m,o,d)")
    for s in range(codes.shape[-3]):
        found = read(codebooks[..., s, :, :], codes[..., s, :, :].astype(jnp.int32))
        *lead, m, o, d = found.shape
        yield jnp.swapaxes(found, -1, -2).reshape(*lead, m * d, o)[..., :inputs, :]
