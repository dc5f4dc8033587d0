"""Optimisers by role: Muon on latents and matrices, AdamW on scales and norms, the rest frozen."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from rabit_jax.errors import BadInput
from rabit_jax.tree import is_weight, map_leaves
from rabit_jax.types import Array, Json, Param, Params

ROLES = ("latent", "scale", "level", "matrix", "embedding", "head", "norm", "bias")
FIXED = ("sign", "code")  # bits and integers: no gradient reaches them
MUON_ROLES = ("latent", "matrix")
SLOWEST = 0.98  # decay of a running mean in bfloat16: there within 3% of float64, at 0.99 25% off


@dataclass(frozen=True)
class OptimizerConfig:
    """How params move.

    Attributes:
      name: "muon" (latents and matrices by Muon, everything else by AdamW), "adamw" for all, or
        "relative" for AdamW whose step is in units of each array's own size, see `scale_by_size`.
      lr: peak learning rate of latents and matrices; Muon's update is scaled to AdamW's root mean
        square (0.2), so one value suits both. Of "relative", 0.01 is a step of 1% of the array.
      scale_lr: peak learning rate of everything else; 0 takes `lr`.
      warmup: share of the steps over which the rate rises linearly.
      schedule: "cosine" to 0, or "constant" after the warm-up.
      clip: largest global gradient norm; 0 does not clip.
      weight_decay: decoupled weight decay on latents and matrices.
      beta1: momentum of AdamW (Muon's is 0.95).
      beta2: second-moment decay of AdamW.
      freeze: roles that do not train, out of latent, scale, level, matrix, embedding, head, norm,
        bias.
      momentum: dtype of the first moment of Muon and AdamW, "float32" or "bfloat16"; "" takes that
        of each array.
    """

    name: Literal["muon", "adamw", "relative"] = "muon"
    lr: float = 1e-3
    scale_lr: float = 0.0
    warmup: float = 0.02
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    freeze: tuple[str, ...] = ()
    momentum: Literal["", "float32", "bfloat16"] = field(default="", metadata={"added": True})

    def __post_init__(self):
        """Raises BadInput for values out of range."""
        unknown = sorted(set(self.freeze) - set(ROLES))
        if unknown:
            raise BadInput(f"freeze names {unknown[0]!r}: the roles are {', '.join(ROLES)}")
        share, amount = "at least 0 and below 1", "finite and not negative"
        ranges = {
            "lr": (0 < self.lr < inf, "positive and finite"),
            "scale_lr": (0 <= self.scale_lr < inf, amount),
            "warmup": (0 <= self.warmup < 1, share),
            "clip": (self.clip >= 0, "not negative; 0 does not clip"),
            "weight_decay": (0 <= self.weight_decay < inf, amount),
            "beta1": (0 <= self.beta1 < 1, share),
            "beta2": (0 <= self.beta2 < 1, share),
        }
        for name, (inside, wanted) in ranges.items():
            if not inside:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be {wanted}")


def roles(params: Params) -> Params:
    """The tree of role names with the structure of `params`.

    A weight node names its own leaves ("latent"; "scale", kept positive; "level", of either sign;
    "sign" and "code", which never train); an array is named by its path:
    "embedding", "head", "norm" (a vector), "bias", otherwise "matrix".
    """

    def name(path: str, leaf: Param) -> PyTree[str]:
        if is_weight(leaf):
            return leaf.roles()
        last, place = path.rpartition("/")[2], _place(path)
        if place == "embedding":
            return "embedding"
        if last == "bias":
            return "bias"
        return "norm" if last == "scale" or leaf.ndim < 2 else place

    return map_leaves(name, params)


def _place(path: str) -> str:
    """"embedding", "head" or "matrix": what a matrix is by its path."""
    parts = path.split("/")
    if "embedding" in parts[-1]:
        return "embedding"
    return "head" if "head" in parts or "lm_head" in parts else "matrix"


def partition(
    params: Params, names: PyTree[str], freeze: tuple[str, ...]
) -> tuple[Params, Params]:
    """Split a tree into `(trainable, frozen)`; each holds None where the other holds an array.

    Signs and codes are frozen always. "embedding" and "head" freeze these parameters whatever they
    are, arrays or weight nodes; in a weight node the other roles freeze single arrays, and "matrix"
    none. Frozen arrays are no arguments of the gradient, so they cost no gradient, no optimiser
    state and no update.
    """
    kept = (*freeze, *FIXED)

    def held(path: str, leaf: Param, name: PyTree[str]) -> PyTree[bool]:
        place = _place(path)
        whole = is_weight(leaf) and place != "matrix" and place in freeze
        return jax.tree.map(lambda n: whole or n in kept, name)

    fixed = map_leaves(held, params, names)
    trainable = jax.tree.map(lambda x, still: None if still else x, params, fixed)
    frozen = jax.tree.map(lambda x, still: x if still else None, params, fixed)
    return trainable, frozen


def merge(trainable: Params, frozen: Params) -> Params:
    """Inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def check_moments(config: OptimizerConfig, trainable: Params, names: PyTree[str]) -> None:
    """Refuse a running mean that 16 bits cannot hold; shapes are enough.

    `m <- b m + (1 - b) x` moves m by `(1 - b) (x - m)`, and bfloat16 rounds away what is less than
    1/512 of m: with b = 0.999 a second moment never falls again.

    Raises:
      BadInput: a moment in bfloat16 whose decay is above 0.98.
    """
    half = {name for x, name in zip(jax.tree.leaves(trainable), jax.tree.leaves(names), strict=True)
            if x.dtype == jnp.bfloat16 and (config.name != "muon" or name not in MUON_ROLES)}
    first = config.momentum == "bfloat16" or (half and not config.momentum)
    for name, held in (("beta1", first), ("beta2", half)):
        if held and getattr(config, name) > SLOWEST:
            raise BadInput(
                f"{name} is {getattr(config, name)} for moments in bfloat16, which then stand "
                "still, as steps below 1/512 of a number are rounded away: take at most "
                f"{SLOWEST}, or float32 for latent_dtype and momentum")


def learning_rate(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to 0 or a constant: step, from 0, -> learning rate.

    The first step has `peak / n` of n warm-up steps, the last has not yet reached 0: none is idle.
    """
    rise = max(1, round(config.warmup * steps))
    if config.schedule == "constant":
        schedule = optax.warmup_constant_schedule(0.0, peak, rise)
    else:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise) + 1)
    return lambda step: schedule(step + 1)


def make_optimizer(
    config: OptimizerConfig, names: PyTree[str], steps: int,
    by_layer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda t: t,
) -> optax.GradientTransformation:
    """Optimiser for a trainable tree whose leaves have the roles `names`.

    `by_layer` wraps what needs whole matrices, see `sharding.layer_by_layer`.

    Muon orthogonalises the last two axes of every latent: its default rule (two axes mean Muon)
    would leave stacked layers `[l, i, o]` to AdamW and take stacked norms `[l, d]` for matrices.
    """
    matrix = learning_rate(config, config.lr, steps)
    other = learning_rate(config, config.scale_lr or config.lr, steps)
    held = config.momentum or None
    adam: Json = {"b1": config.beta1, "b2": config.beta2, "mu_dtype": held}
    labels = jax.tree.map(lambda n: "matrix" if n in MUON_ROLES else "other", names)
    if config.name == "relative":
        move = _relative_adam(config, matrix, config.weight_decay, (-2, -1))
        rest = _relative_adam(config, other, 0.0, (-1,))
    elif config.name == "muon":
        move = by_layer(optax.contrib.muon(
            matrix,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            mu_dtype=held,
            muon_weight_dimension_numbers=_last_two_axes,
        ))
        rest = optax.adamw(other, weight_decay=0.0, **adam)
    else:
        move = optax.adamw(matrix, weight_decay=config.weight_decay, **adam)
        rest = optax.adamw(other, weight_decay=0.0, **adam)
    parts: dict[Hashable, optax.GradientTransformation] = {"matrix": move, "other": rest}
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, optax.partition(parts, labels))


class SizeState(NamedTuple):
    """State of `scale_by_size`.

    Attributes:
      sizes: of each array at the start, shaped to multiply with it.
    """

    sizes: PyTree[Array]


def scale_by_size(axes: tuple[int, ...]) -> optax.GradientTransformation:
    """`u <- rms(x_0) u`: updates in units of each array's root mean square when training began.

    Latents, scales and norms of a model differ in size by orders of magnitude; behind Adam one
    learning rate is then the share by which each of them moves in a step. An array of zeros stays
    as it is.

    Args:
      axes: the mean is over these: both axes of a matrix, so that each layer of a stack has a size
        of its own; the last of scales `[..., k, o]` and of norms, so that each path has one.
    """

    def size(x: jax.Array) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32))
        return jnp.sqrt(jnp.mean(squares, axis=axes, keepdims=True))

    def init(params: PyTree[Array]) -> SizeState:
        return SizeState(jax.tree.map(size, params))

    def update(
        updates: PyTree[Array], state: PyTree, params: PyTree[Array] = None
    ) -> tuple[PyTree[Array], SizeState]:
        return jax.tree.map(jnp.multiply, updates, state.sizes), state

    return optax.GradientTransformation(init, update)


def _relative_adam(
    config: OptimizerConfig, rate: optax.Schedule, decay: float, axes: tuple[int, ...]
) -> optax.GradientTransformation:
    # A relative loss over millions of weights has gradients far below the usual epsilon of 1e-8.
    return optax.chain(
        optax.scale_by_adam(
            config.beta1, config.beta2, eps=1e-15, mu_dtype=config.momentum or None),
        scale_by_size(axes),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )


def _last_two_axes(params: PyTree[Array]) -> PyTree[MuonDimensionNumbers]:
    return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)


def apply_updates(trainable: Params, updates: PyTree, step: Array) -> Params:
    """`x + update` of every array, in float32; bfloat16 arrays are rounded stochastically.

    An update of less than 1/512 of a bfloat16 number is lost when the sum is rounded to the nearest
    one, and so are most updates at the usual learning rates. Rounded up or down with the
    probabilities that make the sum right on average, many small updates move an array as far as
    they would in float32. The random bits follow from the number of the `step` and the place of the
    array, so a resumed run is the uninterrupted one.
    """
    found, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), max(len(found), 1))
    moved = [
        _rounded(x.astype(jnp.float32) + u.astype(jnp.float32), x.dtype, key)
        for x, u, key in zip(found, jax.tree.leaves(updates), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def _rounded(x: jax.Array, dtype: DTypeLike, key: jax.Array) -> jax.Array:
    """Float32 `x` in another dtype; to bfloat16 up or down by chance, with `x` as the mean."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    near = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), near, x).astype(jnp.bfloat16)


def project_scales(
    trainable: Params, names: PyTree[str], floor: float = 1e-2
) -> tuple[Params, Array]:
    """Keep scales positive: `s <- max(s, floor * mean|s|)` along the last axis, after an update.

    A pair whose product is not positive turns its path's signs against the residual, and 16 bits
    cannot hold a scale of 0. The gradient stays the published one.

    Returns:
      The tree, and how many scales were moved (int32).
    """
    moved = []

    def project(x, name):
        if name != "scale":
            return x
        least = floor * jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
        moved.append(jnp.sum(x < least, dtype=jnp.int32))
        return jnp.maximum(x, least)

    projected = jax.tree.map(project, trainable, names)
    return projected, sum(moved, jnp.zeros((), jnp.int32))
