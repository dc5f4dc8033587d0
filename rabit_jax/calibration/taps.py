"""Taps: what measures the inputs and the output gradients of one layer of a Flax model.

A layer's outputs pass through an identity whose custom_vjp "gradient" by a leaf of zeros is
`(sum x^2, sum (dL/dy)^2, number of positions)`. The leaf lies beside the kernel, so that whatever
slices the kernel (scan, vmap) slices it too, and each layer of a stack has its own sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, struct

from rabit_jax.errors import BadInput
from rabit_jax.signs.ste import F32


@dataclass(eq=False)
class Calls:
    """What one calibration saw of the layers while tracing: `{path: (kernel shape, i, o)}`.

    Two are never equal, so that a jitted part of the user's loss is traced anew.
    """

    layers: dict[str, tuple] = field(default_factory=dict)


@struct.dataclass
class Tap:
    """What measures one layer.

    Attributes:
      path: of the kernel in the params.
      calls: where the layer's shapes are noted.
      kernel: `[*inputs, *outputs]`, after leading axes where layers are stacked.
      sums: float32 zeros `[..., i + o + 1]`; None where only shapes are wanted.
      mask: of the batch, repeated for each place of the stack; or None.
    """

    path: str = struct.field(pytree_node=False)
    calls: Calls = struct.field(pytree_node=False)
    kernel: Any = None
    sums: Any = None
    mask: Any = None


def measure(layer: Any, x: jax.Array, y: jax.Array, tap: Tap) -> jax.Array:
    """The outputs y, whose gradient by `tap.sums` is `(sum x^2, sum (dL/dy)^2, positions)`.

    Args:
      layer: an `nn.Dense`, `nn.DenseGeneral`, `nnx.Linear` or `nnx.LinearGeneral`.
      x: its inputs; positions are all axes that it does not contract.
      y: its outputs `[*positions, *outputs]`.
      tap: where its shapes are noted; without `sums` that is all.

    Raises:
      BadInput: the kernel has batch axes.
    """
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


def _contracted(layer: Any, ndim: int, path: str) -> tuple[int, ...]:
    """The input axes that a layer sums over, ascending, as they stand in its kernel."""
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
