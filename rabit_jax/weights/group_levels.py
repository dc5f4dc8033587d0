"""What weights with levels per group of inputs share once packed: bit planes, 16-bit levels."""

from __future__ import annotations

from math import prod

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Float16, UInt8

from rabit_jax.errors import BadInput
from rabit_jax.kernels.layout import unpack_bits
from rabit_jax.types import Array
from rabit_jax.weights.axes import axis_size
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.leaves import WeightNode
from rabit_jax.weights.sign_paths import SCALE_DTYPE, pack_positive


class GroupedPlanes(WeightNode):
    """Base of weights with two levels per group of inputs and `planes` planes of bits."""

    @property
    def planes(self) -> int:
        """Bit planes that are stored."""
        return self.sizes()["b"]

    def cost(self) -> Cost:
        """Cost per token, computed on the planes of {0, 1}.

        Additions: the inputs that a plane selects, `planes i o`, and one for each plane, group and
        output that joins the groups' sums, `planes n o`. Multiplications: the two levels of a group
        times its sums, `2 n o`. What is shared by all outputs, the sum of the inputs of a group, is
        left out; so are shifts.
        """
        *lead, i, o = self.shape
        layers, n = prod(lead), axis_size("i//group", self.sizes())
        additions = layers * self.planes * (i + n) * o
        return Cost(layers * 2 * n * o, additions, 0, self.deployed_bytes())


def pack_codes(codes: UInt8[Array, "... i o"], bits: int) -> UInt8[Array, "... b o n"]:
    """Codes below `2^bits`, uint8 `[..., i, o]` -> planes `[..., bits, o, 32 ceil(i / 256)]`."""
    return jnp.stack([pack_positive((codes >> p & 1).astype(bool)) for p in range(bits)], axis=-3)


def unpack_codes(bits: UInt8[Array, "... b o n"], inputs: int) -> UInt8[Array, "... i o"]:
    """Planes uint8 `[..., bits, o, 32 ceil(i / 256)]` -> codes uint8 `[..., i, o]`."""
    planes = (unpack_bits(bits[..., p, :, :], inputs) << p for p in range(bits.shape[-3]))
    return jnp.swapaxes(sum(planes), -1, -2)


SMALLEST = 1e-4  # float16 is normal from 6.1e-5


def storable(scales: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Scales of one matrix, raised to 1e-4, which 16 bits can hold, or to a quarter of the largest.

    The lesser of the two is the floor: only groups of small weights in a matrix of larger ones are
    coarsened for it, not a matrix that is small as a whole. Zeros, of a matrix of zeros, stay.
    """
    return jnp.maximum(scales, jnp.minimum(SMALLEST, jnp.max(scales) / 4))


def to_half(
    values: Float[Array, "*n"], label: str, name: str, lead: int = 0, scale: bool = False
) -> Float16[Array, "*n"]:
    """Round to float16 and check that 16 bits hold the values.

    The first `lead` axes are those of stacked layers. Zeros of a matrix that has nothing else are
    kept. A level too small for float16's normal range loses digits, which must not matter beside
    the largest of its matrix.

    Raises:
      BadInput: a value is or would become infinite or NaN; or, of a `scale`, 0, negative or
        subnormal; or a level changes by more than 0.1% of the largest level of its matrix. The
        message names the layer and the value.
    """
    if isinstance(values, Tracer):  # as under jax.eval_shape: there is nothing to check
        return values.astype(SCALE_DTYPE)
    wide, half = np.asarray(values, np.float32), values.astype(SCALE_DTYPE)
    rounded = np.asarray(half, np.float32)
    finite = np.where(np.isfinite(wide), np.abs(wide), 0)
    largest = finite.max(axis=tuple(range(lead, wide.ndim)), keepdims=True)
    if scale:
        zero = (largest == 0) & (wide == 0)
        kept = (rounded >= float(np.finfo(np.float16).tiny)) | zero
    else:
        with np.errstate(invalid="ignore"):
            kept = np.abs(rounded - wide) <= 1e-3 * largest
    bad = np.argwhere(~(np.isfinite(rounded) & kept))
    if len(bad):
        what, wanted = ("scale", "6.1e-05 to 65504") if scale else (
            "level", "0 and 6.1e-05 to 65504 of either sign")
        raise BadInput(
            f"{name}: {what} {label}{bad[0].tolist()} is {wide[tuple(bad[0])]:.3g} ({len(bad)} of "
            f"{wide.size} leave what float16 holds here, {wanted}): train with a lower rate, or "
            "initialise this layer again"
        )
    return half
