"""Sign paths whose output scales belong to groups of consecutive inputs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.groups import group_count, spread
from rabit_jax.signs.ste import F32
from rabit_jax.tree import per_layer, pytree_dataclass
from rabit_jax.types import Array, Shape, Spec
from rabit_jax.weights.axes import Sizes
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import leaf, part, size, static
from rabit_jax.weights.sign_paths import SignPaths, pack_positive


def grouped(
    spec: Spec, group: int, w: Float[Array, "... i o"], stats: Stats | None, key: Array | None
) -> GroupedSign:
    """The node of a spec of sign paths for a kernel `[..., i, o]`, group by group of its inputs.

    Scales `h[k, i]`, `g[k, m, o]` with `m = floor(i / group)` tie no group to another: each is a
    matrix `[group, o]` of its own and is fitted as one. A last group that is shorter is filled with
    zeros, which have no part in the fit.

    Args:
      spec: of the matrix of one group.
      group: inputs of a group.
      w: float `[..., i, o]`.
      stats: calibration statistics `[..., i]`, `[..., o]`, or None.
      key: for specs that draw random numbers.
    """
    *lead, i, o = w.shape
    n = group_count(i, group)
    pad = [(0, 0)] * len(lead) + [(0, n * group - i)]
    blocks = jnp.pad(w, [*pad, (0, 0)]).reshape(*lead, n, group, o)
    if stats is not None:
        # The importance of zeros matters to nothing, but a mean leaves that of the others alone.
        mean = jnp.mean(stats.s_in, axis=-1, keepdims=True)
        real = jnp.arange(n * group) < i
        s_in = jnp.where(real, jnp.pad(stats.s_in, pad), mean).reshape(*lead, n, group)
        stats = Stats(s_in, jnp.broadcast_to(stats.s_out[..., None, :], (*lead, n, o)))
    return GroupedSign(spec.init(blocks, stats, key), i)


@pytree_dataclass
class PackedGroupedSign(SignPaths):
    """`W_hat[i, o] = sum_k h_k[i] B_k[i, o] g_k[m, o]`, `m = floor(i / group)`, packed.

    Attributes:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`, `B_k` in the `rb256` layout.
      g: float16 `[..., k, n, o]`, `n = ceil(i / group)`.
      h: float16 `[..., k, i]`.
      group: inputs that share an output scale.
    """

    bits: Array = leaf("sign", "k o i/8")
    g: Array = leaf("scale", "k i//group o")
    h: Array = leaf("scale", "k i")
    group: int = size("group")

    header_type = "grouped_sign"
    header_sizes = {"k": "k", "group": "group"}

    def matmul(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat` on a CPU."""
        from rabit_jax.kernels.grouped_signs import grouped_signs_matmul

        one = (array[None] for array in (self.bits, self.g, self.h))
        return grouped_signs_matmul(x, *one, group=self.group)

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return jnp.swapaxes(unpack_bits(self.bits, self.shape[-2]), -1, -2).astype(bool)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs = self.signs()
        for k in range(self.k):
            scales = spread(self.g[..., k, :, :].astype(F32), self.group, self.shape[-2])
            yield signs[..., k, :, :] * (scales * self.h[..., k, :, None].astype(F32))

    def cost(self) -> Cost:
        """As `GroupedSign.cost`."""
        return _cost(self.shape, self.sizes(), self.deployed_bytes())


@pytree_dataclass
class GroupedSign(SignPaths):
    """Sign paths in training, `W_hat[i, o] = sum_k h_k[i] B_k[i, o] g_k[m, o]`.

    Attributes:
      blocks: the trained node `[..., n, group, o]` of the groups, each a matrix with scales of its
        own; the last one may be filled with zeros.
      inputs: `i`.

    Example:
      >>> node = ResidualSignSpec(k=2, group=64).init(w)      # w: [576, 1536]
      >>> node.blocks.shape
      (9, 64, 1536)
    """

    blocks: Any = part()
    inputs: int = static()

    packed = PackedGroupedSign
    paths_of = "blocks"

    @property
    def shape(self) -> Shape:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.lead(), self.inputs, self.blocks.shape[-1])

    def lead(self) -> Shape:
        """Sizes of the axes of stacked layers."""
        return self.blocks.shape[:-3]

    def sizes(self) -> Sizes:
        """Sizes of the named axes of the packed form."""
        group, o = self.blocks.shape[-2:]
        return {"k": self.blocks.k, "i": self.inputs, "o": o, "group": group}

    def positive(self) -> Bool[Array, "... k i o"]:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        return jnp.moveaxis(self._joined(jnp.moveaxis(self.blocks.positive(), -3, 0)), 0, -3)

    def paths(self) -> Iterator[Float[Array, "... i o"]]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        return map(self._joined, self.blocks.paths())

    def dense(self) -> Float[Array, "... i o"]:
        """`W_hat`, float32 `[..., i, o]`."""
        return self._joined(self.blocks.dense())

    def pack(self, name: str) -> PackedGroupedSign:
        """The bits of all groups in rows of all inputs, and their balanced scales in 16 bits.

        Raises:
          BadInput: a scale leaves the float16 range; the message begins with `name`.
        """
        own, i = self.blocks.pack(name), self.inputs
        h = jnp.moveaxis(own.h, -3, -2)
        h = h.reshape(*h.shape[:-2], -1)[..., :i]
        positive = GroupedSign(own, i).positive()
        # Rows of one path of one layer at a time: bools take eight times the bits.
        bits = per_layer(pack_positive, positive)
        return PackedGroupedSign(bits, jnp.moveaxis(own.g, -3, -2), h, self.sizes()["group"])

    def bits_per_weight(self) -> float:
        """`k (1 + 16 n / i + 16 / o)` with n groups."""
        return self._outline().bits_per_weight()

    def deployed_bytes(self) -> int:
        """Bytes of all arrays in a packed file, padding included; from the shapes alone."""
        return prod(self.lead()) * self._outline().deployed_bytes()

    def cost(self) -> Cost:
        """Cost per token: `k (i + n o)` multiplications and `k i o` additions a layer, n groups."""
        return _cost(self.shape, self.sizes(), self.deployed_bytes())

    def _outline(self) -> PackedGroupedSign:
        i, o = self.shape[-2:]
        sizes = self.sizes()
        return PackedGroupedSign.abstract(
            {"in": i, "out": o, "k": sizes["k"], "group": sizes["group"]})

    def _joined(self, blocks: jax.Array) -> jax.Array:
        """`[..., n, group, o]` -> `[..., i, o]`."""
        *lead, n, group, o = blocks.shape
        return blocks.reshape(*lead, n * group, o)[..., : self.inputs, :]


def _cost(shape: Shape, sizes: Sizes, stored: int) -> Cost:
    *lead, i, o = shape
    paths, n = prod(lead) * sizes["k"], group_count(i, sizes["group"])
    return Cost(paths * (i + n * o), paths * i * o, 0, stored)
