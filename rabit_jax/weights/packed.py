"""`PackedSign`: the deployed form, one bit per sign and 16-bit scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rabit_jax.errors import BadInput
from rabit_jax.weights.convert import per_layer
from rabit_jax.weights.paths import SignPaths
from rabit_jax.weights.ste import F32, outer

SCALE_DTYPE = jnp.float16


@struct.dataclass
class PackedSign(SignPaths):
    """`W_hat = sum_i diag(h_i) B_i diag(g_i)` with `B_i` packed in the `rb256` layout.

    Attributes:
      bits: uint8 `[..., k, o, 32 ceil(i / 256)]`.
      g: float16 `[..., k, o]`.
      h: float16 `[..., k, i]`.
      limbs: bytes of fixed point that integer kernels give each activation, 2 or 3, as
        `init.record_limbs` chose it; None leaves it to them.
    """

    bits: jax.Array
    g: jax.Array
    h: jax.Array
    limbs: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[..., i, o]` of the matrix."""
        return (*self.g.shape[:-2], self.h.shape[-1], self.g.shape[-1])

    def matmul(self, x: jax.Array) -> jax.Array:
        """`x @ W_hat`, `[..., i]` -> `[..., o]`, without building `W_hat`."""
        from rabit_jax.kernels.matmul import packed_matmul

        return packed_matmul(x, self.bits, self.g, self.h, limbs=self.limbs or 2)

    def positive(self) -> jax.Array:
        """Signs as bool `[..., k, i, o]`, True for +1."""
        from rabit_jax.kernels.layout import unpack_bits

        return jnp.swapaxes(unpack_bits(self.bits, self.shape[-2]), -1, -2).astype(bool)

    def paths(self) -> Iterator[jax.Array]:
        """`W_hat_1, ..., W_hat_k`, float32 `[..., i, o]`."""
        signs = self.signs()
        for i in range(self.k):
            scales = outer(self.h[..., i, :].astype(F32), self.g[..., i, :].astype(F32))
            yield signs[..., i, :, :] * scales

    def dense(self) -> jax.Array:
        """`W_hat`, float32 `[..., i, o]`."""
        return sum(self.paths())

    def roles(self) -> PackedSign:
        """Leaf names for the mesh."""
        return self.replace(bits="sign", g="scale", h="scale")

    def pack(self, name: str) -> PackedSign:
        """Itself: already packed."""
        return self

    def header(self) -> dict[str, Any]:
        """What the packed file says of one matrix: `{"type": "sign", "in", "out", "k"}`.

        And `"limbs"`, where they were chosen.
        """
        i, o = self.shape[-2:]
        limbs = {} if self.limbs is None else {"limbs": self.limbs}
        return {"type": "sign", "in": i, "out": o, "k": self.k, **limbs}

    @classmethod
    def abstract(cls, header: Mapping[str, Any]) -> PackedSign:
        """The node of one matrix as shapes and dtypes, from its `header`."""
        from rabit_jax.kernels.layout import packed_bytes

        i, o, k = header["in"], header["out"], header["k"]
        shapes = {"bits": (k, o, packed_bytes(i)), "g": (k, o), "h": (k, i)}
        dtypes = {"bits": jnp.uint8, "g": SCALE_DTYPE, "h": SCALE_DTYPE}
        limbs = header.get("limbs")
        if limbs not in (None, 2, 3):
            raise ValueError(f"limbs {limbs}")
        arrays = {n: jax.ShapeDtypeStruct(s, dtypes[n]) for n, s in shapes.items()}
        return cls(**arrays, limbs=limbs)


def pack_positive(positive: jax.Array) -> jax.Array:
    """Bool `[..., i, o]`, True for +1 -> `rb256` bits, uint8 `[..., o, 32 ceil(i / 256)]`."""
    from rabit_jax.kernels.layout import pack_bits

    return per_layer(lambda one: pack_bits(one.T), positive)


@jax.jit
def balance(*scales: jax.Array) -> tuple[jax.Array, ...]:
    """Give the scales of each path equal geometric means; their product is unchanged.

    The 16-bit range then serves all of them equally. float32, such as `g: [..., k, o]`,
    `h: [..., k, i]`.
    """
    log_means = [jnp.mean(jnp.log(jnp.abs(s)), axis=-1, keepdims=True) for s in scales]
    wanted = sum(log_means) / len(scales)
    return tuple(s * jnp.exp(wanted - m) for s, m in zip(scales, log_means, strict=True))


def round_scales(name: str, **scales: jax.Array) -> tuple[jax.Array, ...]:
    """Balance the scales of a weight, `g=..., h=...`, and round them to float16.

    Raises:
      BadInput: a scale is or would become 0, subnormal, infinite or NaN; the message names the
        layer and the scale.
    """
    _check_scales(scales, name, float(np.finfo(np.float32).tiny))
    rounded = tuple(s.astype(SCALE_DTYPE) for s in balance(*scales.values()))
    labelled = dict(zip(scales, rounded, strict=True))
    _check_scales(labelled, name, float(np.finfo(np.float16).tiny))
    return rounded


def _check_scales(scales: Mapping[str, jax.Array], name: str, smallest: float) -> None:
    for label, scale in scales.items():
        values = np.asarray(scale, np.float32)
        bad = np.argwhere(~((np.abs(values) >= smallest) & np.isfinite(values)))
        if len(bad):
            raise BadInput(
                f"{name}: scale {label}{bad[0].tolist()} becomes {values[tuple(bad[0])]:.3g} in "
                f"float16 ({len(bad)} of {values.size} leave the normal range 6.1e-05 to 65504): "
                "keep scales positive while training, or initialise this layer again"
            )
