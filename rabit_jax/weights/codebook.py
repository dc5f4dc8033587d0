"""Residual vector quantisation: a sum of vectors read from small tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats, check_exponents, importance
from rabit_jax.signs.ste import F32, summed
from rabit_jax.tree import per_layer, pytree_dataclass, split_key
from rabit_jax.types import Array
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.group_levels import pack_codes, storable, to_half, unpack_codes
from rabit_jax.weights.leaves import WeightNode, leaf, size

SCORES = 2**22  # distances held at a time: 16 MB


@dataclass(frozen=True)
class CodebookSpec:
    """Additive codebooks, one k-means after another on what the stages before leave.

    `g` is the root mean square of each output's column. Each stage minimises
    `sum (d_in d_out g)^2 (x - c)^2` over the vectors x of d inputs of `W / g`, which is the error
    of W in the metric of `diag(d_in) W diag(d_out)`, `d = importance(stats, a)`. Codes take
    `stages bits / dim` bits per weight: 2 with the defaults.

    Attributes:
      stages: codebooks that are added, 1 to 8.
      dim: inputs that share a code.
      bits: bits of a code, 1 to 8; a codebook has `2^bits` entries.
      a_in: exponent of the input importance; 0 ignores it.
      a_out: exponent of the output importance; 0 ignores it.
      iterations: Lloyd iterations of each stage.

    Example:
      >>> node = CodebookSpec().init(w, stats)      # w: [..., i, o]
      >>> node.codebooks.shape                      # [..., 2, 16, 4]
    """

    stages: int = 2
    dim: int = 4
    bits: int = 4
    a_in: float = 0.5
    a_out: float = 0.5
    iterations: int = 25
    type: Literal["codebook"] = field(default="codebook", kw_only=True)

    def __post_init__(self):
        """Raises BadInput for a setting out of its range."""
        if not (1 <= self.stages <= 8 and 1 <= self.bits <= 8):
            raise BadInput(
                f"stages {self.stages}, bits {self.bits}: each must lie in 1..8, a code is a byte "
                "at most"
            )
        if self.dim < 1 or self.iterations < 0:
            raise BadInput(
                f"dim {self.dim}, iterations {self.iterations}: a vector must hold at least 1 "
                "input, and iterations must not be negative"
            )
        check_exponents(self.a_in, self.a_out)

    def init(
        self, w: Float[Array, "... i o"], stats: Stats | None = None, key: jax.Array | None = None
    ) -> Codebook:
        """Kernel `[..., i, o]` -> `Codebook`, fitted layer by layer.

        Args:
          w: float `[..., i, o]`.
          stats: calibration statistics `[..., i]`, `[..., o]`; None fits the plain squared error.
          key: draws the entries that k-means starts from, one key for all or one per layer;
            None for `jax.random.key(0)`.

        Returns:
          A node without latent: its codes are fixed from here on.
        """
        key = jax.random.key(0) if key is None else key
        codes, codebooks, g = _fit(self, w, stats, key)
        return Codebook(codes, codebooks, g, w.shape[-2])

    def dense(self, node: Codebook) -> Float[Array, "... i o"]:
        """`W_hat: [..., i, o]` float32."""
        return node.dense()


@partial(jax.jit, static_argnums=0)
def _fit(spec: CodebookSpec, w: jax.Array, stats: Stats | None, key: jax.Array) -> tuple:
    *lead, i, o = w.shape
    if stats is None:
        stats = Stats(jnp.ones((*lead, i)), jnp.ones((*lead, o)))
    d_in, d_out = importance(stats.s_in, spec.a_in), importance(stats.s_out, spec.a_out)
    keys = split_key(key, lead)
    return per_layer(partial(_fit_layer, spec), w, d_in, d_out, keys)


def _fit_layer(
    spec: CodebookSpec, w: jax.Array, d_in: jax.Array, d_out: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes uint8 `[stages, m, o]`, codebooks `[stages, entries, d]` and `g: [o]` of one matrix."""
    w = w.astype(F32)
    unit = _power_of_two(jnp.max(jnp.abs(w)))  # so that no square leaves the float32 range
    g = storable(unit * jnp.sqrt(jnp.mean(jnp.square(w / unit), axis=0)))
    pad = -w.shape[0] % spec.dim
    x = jnp.pad(w / jnp.where(g > 0, g, 1)[None], [(0, pad), (0, 0)])
    x = x.reshape(-1, spec.dim, w.shape[1]).swapaxes(1, 2)
    weight_in = jnp.pad(jnp.square(d_in), (0, pad)).reshape(-1, spec.dim)
    weight_out = jnp.square(d_out * (g / unit))
    codes, books = [], []
    for stage in jax.random.split(key, spec.stages):
        start = draw(x, 2**spec.bits, stage)
        code, book = kmeans(x, weight_in, weight_out, start, spec.iterations)
        codes.append(code)
        books.append(book)
        x = x - book[code]
    return jnp.stack(codes).astype(jnp.uint8), jnp.stack(books), g


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is not above `x`, 1 for 0: to divide by it rounds nothing."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    return jnp.where(bits > 0, jax.lax.bitcast_convert_type(bits, F32), 1)


def draw(x: Float[Array, "m o d"], count: int, key: jax.Array) -> Float[Array, "n d"]:
    """`count` of the vectors `x: [m, o, d]`, one from each of as many equal stretches of them."""
    m, o, d = x.shape
    first = np.arange(count, dtype=np.int64) * (m * o) // count
    offset = jax.random.randint(key, (count,), 0, max(m * o // count, 1))
    return x.reshape(-1, d)[jnp.asarray(first, jnp.int32) + offset]


def kmeans(
    x: Float[Array, "m o d"],
    weight_in: Float[Array, "m d"],
    weight_out: Float[Array, " o"],
    start: Float[Array, "n d"],
    iterations: int,
) -> tuple[Int[Array, "m o"], Float[Array, "n d"]]:
    """Lloyd's iteration on `sum_{m,o,j} weight_in[m,j] weight_out[o] (x[m,o,j] - c[j])^2`.

    Every vector goes to the entry with the least error, every entry to the weighted mean of its
    vectors. An entry (or one element of it) that has no weight stays as it is. The vectors are
    taken in pieces, so that only `SCORES` distances exist at a time.

    Args:
      x: float32 `[m, o, d]`.
      weight_in: float32 `[m, d]`, not negative.
      weight_out: float32 `[o]`, not negative.
      start: float32 `[n, d]`, the entries.
      iterations: how often the entries are moved.

    Returns:
      `(codes, entries)`: int32 `[m, o]`, the nearest of the entries returned, and `[n, d]`.
    """
    m, o, _ = x.shape
    rows = min(m, max(1, SCORES // (o * len(start))))
    pieces = _pieces(x, rows), _pieces(weight_in, rows)

    def add(sums, piece, entries):
        x, w = piece
        chosen = jax.nn.one_hot(_nearest(x, w, entries), len(entries), dtype=F32)
        weights = w[:, None, :] * weight_out[None, :, None]
        new = [_einsum("roe,rod->ed", chosen, v) for v in (weights * x, weights)]
        return (sums[0] + new[0], sums[1] + new[1]), None

    def move(_, entries):
        zero = jnp.zeros_like(entries)
        (total, weight), _ = jax.lax.scan(partial(add, entries=entries), (zero, zero), pieces)
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), entries)

    entries = jax.lax.fori_loop(0, iterations, move, start)
    codes = jax.lax.map(lambda piece: _nearest(piece[0], piece[1], entries), pieces)
    return codes.reshape(-1, o)[:m], entries


def _pieces(a: jax.Array, rows: int) -> jax.Array:
    """`[m, ...]` -> `[pieces, rows, ...]`, padded with 0."""
    padded = jnp.pad(a, [(0, -len(a) % rows)] + [(0, 0)] * (a.ndim - 1))
    return padded.reshape(-1, rows, *a.shape[1:])


def _nearest(x: jax.Array, weight_in: jax.Array, entries: jax.Array) -> jax.Array:
    """Index of the entry with the least `sum_j w_j (x_j - c_j)^2`, int32 `[r, o]`.

    The square is expanded into two matrix products, and the term of `x` alone left out.
    `x: [r, o, d]`, `weight_in: [r, d]`.
    """
    cross = _einsum("rod,ed->roe", x * weight_in[:, None, :], entries)
    square = _einsum("rd,ed->re", weight_in, jnp.square(entries))
    return jnp.argmin(square[:, None, :] - 2 * cross, axis=-1)


def _einsum(equation: str, *arrays: jax.Array) -> jax.Array:
    # Accelerators multiply float32 in fewer bits by default, which would move vectors that lie
    # between two entries.
    return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


class CodebookSum(WeightNode):
    """Base of weights with `codebooks: [..., stages, entries, d]`, `g: [..., o]` and `inputs`."""

    codebooks: Array
    g: Array
    inputs: int

    def _terms(self) -> Iterator[Array]:
        """What each stage adds before the output scales, float32 `[..., i, o]`."""
        raise NotImplementedError

    @property
    def k(self) -> int:
        """Number of stages."""
        return self.sizes()["s"]

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`; differentiable in `codebooks` and `g`."""
        return self.g[..., None, :].astype(F32) * summed(self._terms())

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """What each stage adds, `g C_s`, float32 `[..., i, o]`."""
        return (self.g[..., None, :].astype(F32) * term for term in self._terms())

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


@pytree_dataclass
class PackedCodebook(CodebookSum):
    """`W_hat[i, o] = g[o] sum_s C_s[code_s[i // d, o], i mod d]` with the codes as bit planes.

    Attributes:
      bits: uint8 `[..., stages, bits, o, 32 ceil(m / 256)]`, `m = ceil(i / d)`; plane p holds bit p
        of the codes.
      codebooks: float16 `[..., stages, entries, d]`, `entries = 2^bits`.
      g: float16 `[..., o]` output scales ("row scale").
      inputs: `i`; where d does not divide it the last vectors are cut.
    """

    bits: Array = leaf("code", "s b o i//d/8")
    codebooks: Array = leaf("level", "s 2^b d")
    g: Array = leaf("scale", "o")
    inputs: int = size("i")

    header_type = "codebook"
    header_sizes = {"stages": "s", "bits": "b", "dim": "d"}

    def codes(self) -> UInt8[Array, "... s m o"]:
        """uint8 `[..., stages, m, o]`."""
        return unpack_codes(self.bits, vectors(self.inputs, self.codebooks.shape[-1]))

    def _terms(self) -> Iterator[Float[Array, "... i o"]]:
        return codebook_terms(self.codes(), self.codebooks.astype(F32), self.inputs)


def vectors(inputs: int, dim: int) -> int:
    """Vectors in a column of `inputs` weights: `m = ceil(i / d)`."""
    return -(-inputs // dim)


def code_bits(entries: int) -> int:
    """Bits of a code for `entries` entries."""
    return (entries - 1).bit_length()


def codebook_terms(
    codes: UInt8[Array, "... s m o"], codebooks: Float[Array, "... s n d"], inputs: int
) -> Iterator[Float[Array, "... i o"]]:
    """`C_s[code_s[i // d, o], i mod d]` for each of the stages s, float32 `[..., i, o]`.

    `codes: [..., s, m, o]` uint8, `codebooks: [..., s, n, d]` float32.
    """
    read = jnp.vectorize(lambda book, code: book[code], signature="(e,d),(m,o)->(m,o,d)")
    for s in range(codes.shape[-3]):
        found = read(codebooks[..., s, :, :], codes[..., s, :, :].astype(jnp.int32))
        *lead, m, o, d = found.shape
        yield jnp.swapaxes(found, -1, -2).reshape(*lead, m * d, o)[..., :inputs, :]


@pytree_dataclass
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

    codes: Array = leaf("code", "s i//d o")
    codebooks: Array = leaf("level", "s 2^b d")
    g: Array = leaf("scale", "o")
    inputs: int = size("i")

    packed = PackedCodebook

    def pack(self, name: str) -> PackedCodebook:
        """Pack the codes with `log2(entries)` bits each, round tables and scales to 16 bits.

        Raises:
          BadInput: an entry or a scale leaves the float16 range; the message begins with `name`.
        """
        lead = len(self.lead())
        books = to_half(self.codebooks, "codebooks", name, lead)
        g = to_half(self.g, "g", name, lead, scale=True)
        bits = code_bits(self.codebooks.shape[-2])
        planes = per_layer(lambda codes: pack_codes(codes, bits), self.codes)
        return PackedCodebook(planes, books, g, self.inputs)

    def _terms(self) -> Iterator[Float[Array, "... i o"]]:
        return codebook_terms(self.codes, self.codebooks.astype(F32), self.inputs)
