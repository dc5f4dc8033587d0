"""Calibration of any Flax model, whose layers need not know of weight nodes.

A tap (`calibration.taps`) measures each selected layer. In Linen it replaces the kernel in the
params, where an interceptor finds it; in NNX it is put beside the kernel in a copy of the module.
The model itself is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, PyTree

from rabit_jax.calibration.probes import check_finite, check_signal
from rabit_jax.calibration.taps import Calls, Tap, measure
from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats
from rabit_jax.signs.ste import F32
from rabit_jax.tree import Rules, leaves, map_leaves, match_rules
from rabit_jax.types import Array, Params, Shape

Model = TypeVar("Model")
Batch = TypeVar("Batch")
Sizes = Mapping[str, tuple[Shape, int, int]]  # by path: leading axes, i, o

LINEN = (nn.Dense, nn.DenseGeneral)
NNX = (nnx.Linear, nnx.LinearGeneral)


class Sums(nnx.Param):
    """`Tap.sums` in an NNX module, a `Param` because stacked layers slice those."""


class Mask(nnx.Param):
    """`Tap.mask` in an NNX module."""


def calibrate_flax(
    loss: Callable[[Model, Batch], Array], model: Model, batches: Iterable[Batch], rules: Rules
) -> dict[str, Stats]:
    """`calibrate` for any Flax model: root mean square of inputs and output gradients by kernel.

        s_in[c] = sqrt(mean_t x_t[c]^2),   s_out[c] = sqrt(mean_t (dL/dy_t[c])^2)

    t runs over all positions of the layer: all axes of its input that it does not contract, over
    all calls and batches. If a batch is a dict whose `mask` has exactly the shape of those axes,
    positions with a false mask are left out; layers of another shape count all their positions.
    Sums are float32. A layer under `nn.scan` or `nn.vmap` with params stacked along axis 0 has
    separate statistics for each layer of the stack; one that is called several times has the
    statistics of all calls together.

    Args:
      loss: `loss(params, batch) -> scalar`, which calls the Linen model by `model.apply`; or
        `loss(module, batch) -> scalar` for NNX. `L` should be the SUM over the batch of the
        full-precision model's loss against labels.
      model: the first argument of the loss: params of a Linen model, alone or as part of a larger
        tree, or an `nnx.Module`, of which only copies are run.
      batches: inputs of the loss, arrays in any pytree.
      rules: as for `convert`. Paths are those of `params`, or of
        `nnx.to_pure_dict(nnx.state(module, nnx.Param))`. Each selected leaf must be the kernel of
        an `nn.Dense`, `nn.DenseGeneral`, `nnx.Linear` or `nnx.LinearGeneral`.

    Returns:
      `{path: Stats(s_in [..., i], s_out [..., o])}`. i and o are the products of the input and of
      the output axes of a kernel `[..., *inputs, *outputs]`; `convert` infers the axes from them.

    Raises:
      BadInput: no batch; a loss that is not a scalar; a selected layer of another kind, or one that
        is never called or does not affect the loss; statistics not finite, or zero for all.

    Example:
      >>> apply = lambda p, x: model.apply({"params": p}, x)
      >>> loss = lambda p, batch: jnp.sum((apply(p, batch["x"]) - batch["y"]) ** 2)
      >>> rules = [(r"Dense_\\d+/kernel", ResidualSignSpec(k=2))]
      >>> student = convert(params, rules, calibrate_flax(loss, params, batches, rules))
    """
    arrays, params, place = _split(model)
    selected = match_rules(params, rules)
    shapes = {path: leaf.shape for path, leaf in leaves(params) if path in selected}
    calls, sizes, total = Calls(), {}, None

    def measured(zeros: Mapping[str, Array | None], arrays: PyTree, batch: Batch) -> Array:
        taps = _taps(calls, sizes, zeros, batch)
        with nn.intercept_methods(_intercept):
            return loss(place(arrays, taps), batch)

    sums = jax.jit(jax.grad(measured))
    for batch in batches:
        if not sizes:
            value = jax.eval_shape(measured, dict.fromkeys(shapes), arrays, batch)
            _check_scalar(value)
            sizes = {path: _sizes(path, shape, calls) for path, shape in shapes.items()}
        zeros = {path: jnp.zeros((*lead, i + o + 1), F32) for path, (lead, i, o) in sizes.items()}
        found = {p: np.asarray(s, np.float64) for p, s in sums(zeros, arrays, batch).items()}
        total = found if total is None else {p: total[p] + s for p, s in found.items()}
    if total is None:
        raise BadInput("calibration saw no batch: give it at least one")
    stats = {path: _stats(path, total[path], sizes[path][1]) for path in total}
    check_signal(stats)
    return stats


def _split(
    model: PyTree,
) -> tuple[PyTree, Params, Callable[[PyTree, Mapping[str, Tap]], PyTree]]:
    """`(arrays, params, place)`; `place(arrays, taps)` is the model with the taps inserted."""
    if not isinstance(model, nnx.Module):
        return model, model, _in_params
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    # As plain arrays: variables belong to the trace that makes them, here that of the gradient.
    arrays = nnx.to_pure_dict(state)
    return arrays, params, lambda arrays, taps: _in_module(nnx.merge(graph, arrays), taps)


def _taps(
    calls: Calls, sizes: Sizes, zeros: Mapping[str, Array | None], batch: object
) -> dict[str, Tap]:
    """The taps of one batch; without `sizes` they only record shapes."""
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    taps = {}
    for path, sums in zeros.items():
        lead = sizes[path][0] if path in sizes else ()
        stacked = None if mask is None else _stacked(jnp.asarray(mask, F32), lead)
        taps[path] = Tap(path, calls, sums=sums, mask=stacked if sizes else None)
    return taps


def _stacked(mask: Float[Array, ...], lead: Shape) -> Float[Array, ...]:
    return jnp.broadcast_to(mask.reshape((1,) * len(lead) + mask.shape), (*lead, *mask.shape))


# Linen: the tap replaces the kernel; an interceptor finds it in the layer's variables.


def _in_params(params: Params, taps: Mapping[str, Tap]) -> Params:
    def tapped(path: str, leaf: Array) -> Array | Tap:
        return replace(taps[path], kernel=leaf) if path in taps else leaf

    return map_leaves(tapped, params)


def _intercept(
    next_function: Callable[..., object], args: tuple, kwargs: dict,
    context: nn.module.InterceptorContext,
) -> object:
    """Run a layer whose kernel is a tap with the kernel itself, and measure it."""
    layer = context.module
    mine = dict(layer.variables.get("params", {})) if layer.scope is not None else {}
    taps = {name: leaf for name, leaf in mine.items() if isinstance(leaf, Tap)}
    if not taps:
        return next_function(*args, **kwargs)
    if not isinstance(layer, LINEN) or set(taps) != {"kernel"}:
        name = min(set(taps) - {"kernel"} or taps)
        raise _no_dense(taps[name].path, type(layer), "an nn.Dense or nn.DenseGeneral")
    if context.method_name != "__call__":
        return next_function(*args, **kwargs)
    plain = {**layer.variables, "params": {**mine, "kernel": taps["kernel"].kernel}}
    y = cast(Array, layer.clone(parent=None).apply(plain, *args, **kwargs))
    return measure(layer, args[0] if args else kwargs["inputs"], y, taps["kernel"])


# NNX: a layer of the copy gets a class that measures, and the tap's arrays as variables.


def _in_module(module: nnx.Module, taps: Mapping[str, Tap]) -> nnx.Module:
    nodes = [(path, node) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]
    by_path = {"/".join(map(str, path)): node for path, node in nodes}
    kernels = {}
    for path, tap in taps.items():
        parent, _, name = path.rpartition("/")
        layer = by_path.get(parent)
        if not isinstance(layer, NNX) or name != "kernel":
            raise _no_dense(path, type(layer), "an nnx.Linear or nnx.LinearGeneral")
        arrays = {"calibration_sums": (Sums, tap.sums), "calibration_mask": (Mask, tap.mask)}
        held = {n: kind(a) for n, (kind, a) in arrays.items() if a is not None}
        kernels[id(layer.kernel)] = (tap, held)
    for _, layer in nodes:  # two layers may share one kernel, and then share its sums
        if isinstance(layer, NNX) and id(layer.kernel) in kernels:
            tap, held = kernels[id(layer.kernel)]
            layer.__class__ = _measuring(type(layer), tap.path, tap.calls)
            for name, variable in held.items():
                setattr(layer, name, variable)
    return module


def _measuring(base: type, path: str, calls: Calls) -> type:
    class Measuring(base):
        def __call__(self, inputs, *args, **kwargs):
            y = super().__call__(inputs, *args, **kwargs)
            held = (getattr(self, f"calibration_{name}", None) for name in ("sums", "mask"))
            sums, mask = (None if variable is None else variable[...] for variable in held)
            return measure(self, inputs, y, Tap(path, calls, self.kernel[...], sums, mask))

    return Measuring


def _no_dense(path: str, found: type, wanted: str) -> BadInput:
    return BadInput(
        f"{path} belongs to a {found.__name__}, wanted the kernel of {wanted}: narrow the rule "
        "that selects it"
    )


def _check_scalar(value: object) -> None:
    if not isinstance(value, jax.ShapeDtypeStruct):
        raise BadInput(
            f"the loss is {type(value).__name__}, wanted one float: the sum over the batch"
        )
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise BadInput(
            f"the loss is {value.dtype}{list(value.shape)}, wanted one float: the sum over the "
            "batch"
        )


def _sizes(path: str, shape: Shape, calls: Calls) -> tuple[Shape, int, int]:
    """`(lead, i, o)` of a kernel `[*lead, *inputs, *outputs]`, from the traced calls."""
    if path not in calls.layers:
        raise BadInput(
            f"the loss never calls the layer of {path}: narrow the rule that selects it, or give "
            "it a rule with None"
        )
    own, i, o = calls.layers[path]
    lead = shape[: len(shape) - len(own)]
    if shape != (*lead, *own):
        raise BadInput(
            f"{path} is {list(shape)} and each of its layers {list(own)}: stack layers along the "
            "first axis"
        )
    return lead, i, o


def _stats(path: str, sums: np.ndarray, i: int) -> Stats:
    """Statistics of one kernel from `(sum x^2, sum (dL/dy)^2, positions)`, `[..., i + o + 1]`."""
    count = sums[..., -1:]
    if (count == 0).any():
        raise BadInput(
            f"calibration of {path}: the gradient of the loss does not reach this layer, or the "
            "mask keeps none of its positions; narrow the rule that selects it"
        )
    rms = np.sqrt(sums[..., :-1] / count)
    stats = Stats(jnp.asarray(rms[..., :i], F32), jnp.asarray(rms[..., i:], F32))
    check_finite(path, stats)
    return stats
