"""Taps: measuring the inputs and the output gradients of one layer of a Flax model.

A layer's outputs pass through an identity whose custom_vjp "gradient" by a leaf of zeros is
`(sum x^2, sum (dL/dy)^2, number of positions)`. The leaf is stored beside the kernel, so that scan
and vmap slice it together with the kernel, and each layer of a stack has its own sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.ste import F32
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Shape

Layer = nn.Dense | nn.DenseGeneral | nnx.Linear | nnx.LinearGeneral


@dataclass(eq=False)
class Calls:
    """The shapes of the layers that one calibration traced: `{path: (kernel shape, i, o)}`.

    Two instances are never equal, so that a jitted part of the user's loss is traced again.
    """

    layers: dict[str, tuple[Shape, int, int]] = field(default_factory=dict)


@pytree_dataclass
class Tap:
    """The measurement of one layer.

    Attributes:
      path: path of the kernel in the params.
      calls: record of the layer's shapes.
      kernel: `[..., *inputs, *outputs]`, with leading axes if layers are stacked.
      sums: float32 zeros `[..., i + o + 1]`; None to record only shapes.
      mask: float32 mask of the batch, repeated over the leading axes of the kernel; or None.
    """

    path: str = struct.field(pytree_node=False)
    calls: Calls = struct.field(pytree_node=False)
    kernel: Array | None = None
    sums: Array | None = None
    mask: Array | None = None


def measure(
    layer: Layer, x: Float[Array, ...], y: Float[Array, ...], tap: Tap
) -> Float[Array, ...]:
    """The outputs y, whose gradient by `tap.sums` is `(sum x^2, sum (dL/dy)^2, positions)`.

    Args:
      layer: the layer.
      x: its inputs; positions are all axes that it does not contract.
      y: its outputs `[*positions, *outputs]`.
      tap: the tap of its kernel, which records the shapes.

    Raises:
      BadInput: the kernel has batch axes.
    """
    assert tap.kernel is not None
    axes = _contracted(layer, x.ndim, tap.path)
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    lead, inner = x.shape[: x.ndim - len(axes)], x.shape[x.ndim - len(axes) :]
    i, o = prod(inner), prod(y.shape[len(lead) :])
    tap.calls.layers[tap.path] = (tap.kernel.shape, i, o)
    if tap.sums is None:
        return y
    x = jax.lax.stop_gradient(x.reshape(*lead, i).astype(F32))
    counted = jnp.ones(lead, F32)
    if tap.mask is not None and tap.mask.shape == lead:
        counted = counted * tap.mask
    return _tapped(y.reshape(*lead, o), x, counted, tap.sums).reshape(y.shape)


def _contracted(layer: Layer, ndim: int, path: str) -> tuple[int, ...]:
    """The input axes that a layer sums over, ascending, which is their order in its kernel."""
    if isinstance(layer, (nn.Dense, nnx.Linear)):
        return (ndim - 1,)
    if getattr(layer, "batch_dims", None) or getattr(layer, "batch_axis", None):
        raise BadInput(f"{path} has batch axes in its kernel, which are not supported: give it a "
                       "rule with None")
    axes = (layer.axis,) if isinstance(layer.axis, int) else layer.axis
    return tuple(sorted(axis % ndim for axis in axes))


@jax.custom_vjp
def _tapped(y, x, counted, sums):
    return y


def _tapped_forward(y, x, counted, sums):
    return y, (x, counted)


def _tapped_backward(residuals, dy):
    x, counted = residuals
    squares = (jnp.square(a.astype(F32)) * counted[..., None] for a in (x, dy))
    x2, dy2 = (s.reshape(-1, s.shape[-1]).sum(axis=0) for s in squares)
    sums = jnp.concatenate([x2, dy2, jnp.sum(counted)[None]])
    return dy, jnp.zeros_like(x), jnp.zeros_like(counted), sums


_tapped.defvjp(_tapped_forward, _tapped_backward)
