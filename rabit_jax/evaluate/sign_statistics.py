"""What the signs of a training run do: flips, order of the scales, weights against their levels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import TypedDict

import jax
import numpy as np
from jaxtyping import Bool, Float

from rabit_jax import hosts
from rabit_jax.errors import BadInput
from rabit_jax.signs.ste import F32, disordered, flips
from rabit_jax.tree import leaves, per_layer, weights_of
from rabit_jax.types import Array, Params, Weight

Signs = Mapping[str, jax.Array]


class Histogram(TypedDict):
    """Weights of one layer in units of their scale: counts, bin edges (one more), levels."""

    layer: str
    weights: list[int]
    edges: list[float]
    levels: list[float]


def snapshot(params: Params) -> dict[str, Bool[Array, ...]]:
    """The signs of every weight that has them: `{path: bool [..., k, i, o]}`, True for +1."""
    return _positive({path: w for path, w in weights_of(params).items() if _has_signs(w)})


def _has_signs(node: Weight) -> bool:
    terms = getattr(node, "terms", None)
    return any(map(_has_signs, terms)) if terms else hasattr(node, "positive")


@jax.jit
def _positive(nodes):
    return {path: node.positive() for path, node in nodes.items()}


def flip_rate(before: Signs, after: Signs) -> dict[str, Float[Array, "... k"]]:
    """Share of signs that differ between two snapshots: `{path: float32 [..., k]}`.

    Raises:
      BadInput: the snapshots are of different weights.

    Example:
      >>> before = snapshot(params)
      >>> params = step(params)
      >>> flip_rate(before, snapshot(params))["layers/mlp/up/kernel"].shape     # l, k
      (12, 2)
    """
    shapes = [{path: signs.shape for path, signs in side.items()} for side in (before, after)]
    if shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise BadInput(f"the two sign snapshots differ at {differing}: take both of the same model")
    return _flips(dict(before), dict(after))


@jax.jit
def _flips(before, after):
    return jax.tree.map(flips, before, after)


def mean_flip_rate(before: Signs, after: Signs) -> float | None:
    """Share of all signs of the model that differ; None where no weight has signs."""
    rates = flip_rate(before, after)
    return _weighted([(np.mean(rate), before[path].size) for path, rate in rates.items()])


def disordered_share(params: Params) -> float | None:
    """Share of weight elements whose scale products do not fall, `a_i <= a_{i+1}` or `a_i <= 0`.

    There a weight's levels are no longer a nearest rounding of its latent. For k = 2 this is the
    share with a <= b. None where no weight has signs `[..., k, i, o]` and scales `g: [..., k, o]`,
    `h: [..., k, i]`.
    """
    nodes = {
        path: (w.g, w.h)
        for path, w in leaves(params)
        if all(hasattr(w, name) for name in ("signs", "g", "h", "k")) and w.g.ndim == w.h.ndim
    }
    shapes = {path: weights_of(params)[path].shape for path in nodes}
    return _weighted([(np.mean(s), prod(shapes[p])) for p, s in _disordered(nodes).items()])


@jax.jit
def _disordered(nodes):
    return {
        path: per_layer(disordered, g.astype(F32), h.astype(F32)) for path, (g, h) in nodes.items()
    }


def _weighted(shares: list[tuple[np.floating, int]]) -> float | None:
    total = sum(size for _, size in shares)
    return float(sum(share * (size / total) for share, size in shares)) if total else None


def weight_histogram(
    params: Params, path: str, layer: int | None = None, bins: int = 120
) -> Histogram:
    """Histogram of one latent over its first scale product, `W / a`, `a = h_1 g_1^T` elementwise.

    Args:
      params: tree with a weight node that has `latent`, `g` and `h` at `path`.
      path: as in the tree, "layers/mlp/up/kernel".
      layer: index into the stacked layers; None for an unstacked weight.
      bins: number of bins.

    Returns:
      `layer`: name, "layers/mlp/up[1]"; `edges`: `bins + 1` floats; `weights`: `bins` counts, what
      lies beyond the 99.9th percentile of `|W / a|` left out; `levels`: the 2^k values that
      `W_hat / a` can take, `s_1 + sum_{i>1} s_i mean(h_i g_i^T / a)`, ascending.

    Of several processes all have to call this.

    Raises:
      BadInput: no such node at `path`, or a layer that it does not have.
    """
    latent, g, h = _one_layer(params, path, layer)
    ratio = latent / np.outer(h[0], g[0])
    # The mean of an outer product is the product of the means.
    steps = np.mean(h / h[:1], axis=1) * np.mean(g / g[:1], axis=1)
    levels = sorted(float(np.dot(s, steps)) for s in product((-1.0, 1.0), repeat=len(steps)))
    limit = max(float(np.quantile(np.abs(ratio), 0.999)), 1.1 * levels[-1])
    counts, edges = np.histogram(ratio, bins=bins, range=(-limit, limit))
    name = path.removesuffix("/kernel") + ("" if layer is None else f"[{layer}]")
    return {
        "layer": name, "edges": edges.tolist(), "weights": counts.tolist(), "levels": levels,
    }


def _one_layer(params: Params, path: str, layer: int | None) -> list[np.ndarray]:
    nodes, names = weights_of(params), ("latent", "g", "h")
    if path not in nodes or not all(hasattr(nodes[path], name) for name in names):
        raise BadInput(
            f"no weight with a latent and scales at {path!r}: the weights are "
            f"{', '.join(nodes) or 'none'}"
        )
    arrays = [getattr(nodes[path], name) for name in names]
    layers = len(arrays[0]) if arrays[0].ndim == 3 else None
    if layer is not None if layers is None else layer is None or not 0 <= layer < layers:
        raise BadInput(f"{path} is {list(arrays[0].shape)}: layer {layer} does not select a matrix")
    chosen = arrays if layer is None else [a[layer] for a in arrays]
    return [np.asarray(hosts.whole(a.astype(F32)), np.float64) for a in chosen]
