"""Tuning of one block of a model on its output, whatever its weights are represented by.

A quantised block f is trained to give what the full-precision block gives at the same place,

    loss = mean_t |f(x_t) - y_t|^2 / |y_t|^2,

relative to y token by token, as the residual stream of a few tokens is a thousand times larger than
that of the others. With x from the blocks before it as they are once quantised, each block makes up
for the errors of its prefix. What trains follows from the roles of the leaves. Sources: Block-AP of
EfficientQAT (arXiv 2407.11062), OmniQuant (arXiv 2308.13137).

The models of the first sign paths of every weight can be tuned together. That of n paths has its
own inputs, which the blocks before give with n paths, and its own loss L_n; the block's is

    loss = prod_n L_n^(w_n / sum_n w_n),

a geometric mean, for a model of one path errs ten times as much as one of three, and of a sum only
its loss would be heard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.hosts import on_mesh
from rabit_jax.train.losses import summed_hidden_error
from rabit_jax.train.optimizer import (
    OptimizerConfig,
    check_moments,
    make_optimizer,
    merge,
    partition,
    roles,
)
from rabit_jax.train.sharding import batch_sharding, like_params, replicated, row_shards
from rabit_jax.train.step import Metrics, TrainState, init_state, make_step
from rabit_jax.tree import map_leaves
from rabit_jax.types import Array, Batch, Params
from rabit_jax.weights.mixed_stack import narrowed

# `block(params, batch) -> [b, t, d]`; a batch has the input "x: [b, t, d]", the wanted output "y",
# and whatever else the block reads.
Block = Callable[[Params, Batch], Array]
Inputs = Float[np.ndarray, "n t d"] | Mapping[int, Float[np.ndarray, "n t d"]]
Models = tuple[tuple[int, float], ...]  # numbers of paths and weights, ascending


@dataclass(frozen=True)
class TuningConfig:
    """How a block is trained.

    Attributes:
      epochs: most passes over the training windows.
      batch_size: windows of a step.
      patience: epochs without a lower loss on the held-out windows after which a block is done.
      optimizer: of latents (`lr`) and of scales, levels, norms and biases (`scale_lr`); `freeze`
        names the roles that do not train. The schedule spans all epochs.
    """

    epochs: int = 8
    batch_size: int = 8
    patience: int = 2
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("relative", lr=0.01, freeze=("matrix",))
    )

    def __post_init__(self):
        """Raises BadInput for counts out of range."""
        least = {"epochs": 0, "batch_size": 1, "patience": 1}
        for name, wanted in least.items():
            if getattr(self, name) < wanted:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least {wanted}")


@dataclass(frozen=True)
class Tuned:
    """A tuned block.

    Attributes:
      params: those of the epoch with the lowest loss on the held-out windows.
      before: that loss at the start.
      after: that loss now, never above `before`.
      losses: it after every epoch that was trained.
      nested: where models of the first paths were tuned together, what `after` is the mean of, by
        the number of paths.
    """

    params: Params
    before: float
    after: float
    losses: tuple[float, ...]
    nested: Mapping[int, float] = field(default_factory=dict)


def tune_block(
    block: Block,
    params: Params,
    x: Inputs,
    y: Float[np.ndarray, "n t d"],
    config: TuningConfig,
    held_out: int,
    seed: int = 0,
    extra: Mapping[str, Array] | None = None,
    done: Callable[[int, float], None] | None = None,
    mesh: Mesh | None = None,
    nested: Mapping[int, float] | None = None,
) -> Tuned:
    """Trains the weight nodes of one block, with its norms, so that `block(params, x)` comes to y.

    One compiled step serves all blocks whose params have the same shapes, where `block` is the same
    function.

    Args:
      block: `block(params, batch) -> output [b, t, d]`; `batch["x"]` is its input. It multiplies
        by `linear(x, w)`.
      params: of this block: weight nodes with latents, and arrays.
      x: inputs of all windows; may be a memory map, of which a batch is read at a time. With
        `nested`, those of each model by its number of paths.
      y: outputs of the full-precision block, from its own inputs.
      config: settings.
      held_out: the last so many windows choose the epoch and are not trained on.
      seed: of the order of windows.
      extra: what else `block` reads from a batch, the same for all.
      done: called after each step with the number of steps done and the loss on held-out windows.
      mesh: that `params` lie on, with batches by rows; None for one device. Of several processes
        each reads the same x and y.
      nested: `{n: w_n}`, the numbers of sign paths whose models are tuned together, and the weights
        of their losses; a weight with fewer paths has all of its own in each. None tunes the whole
        model alone.

    Raises:
      BadInput: settings that leave nothing to train or nothing held out, moments that 16 bits
        cannot hold, inputs of other models than those in `nested`, or a loss that is not finite.

    Example:
      >>> tuned = tune_block(run, params, x, y, TuningConfig(epochs=4), held_out=8)
      >>> tuned.after <= tuned.before
      True
    """
    extra, train = dict(extra or {}), len(y) - held_out
    models = tuple(sorted((nested or {}).items()))
    _check(x, models, train, held_out)
    steps_each = -(-train // config.batch_size)
    steps = config.epochs * steps_each
    freeze = config.optimizer.freeze
    names = roles(params)
    trainable, frozen = partition(params, names, freeze)
    if not jax.tree.leaves(trainable):
        raise BadInput(f"freeze {list(freeze)} leaves nothing of a block to train")
    check_moments(config.optimizer, trainable, partition(names, names, freeze)[0])
    state = _start(config, steps, trainable, frozen)
    if mesh is not None:
        where = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        opt_state = like_params(state.opt_state, trainable, where, mesh)
        state = on_mesh(state, TrainState(replicated(mesh), where, opt_state))  # pyright: ignore

    def held_out_losses(trainable: Params) -> tuple[float, tuple[float, ...]]:
        starts = range(train, len(y), config.batch_size)
        rows = (slice(start, start + config.batch_size) for start in starts)
        sums = [_errors(block, models, merge(trainable, frozen), _batch(x, y, r, extra, mesh))
                for r in rows]
        means = [sum(map(float, own)) / (held_out * y.shape[1]) for own in zip(*sums, strict=True)]
        return float(_mean(models, means)), tuple(means)

    best, losses = trainable, []
    before, each = held_out_losses(trainable)
    lowest = last = before
    _check_finite(before, "before the first step")
    count, stale = 0, 0
    for epoch in range(config.epochs):
        for rows in _epoch(train, config.batch_size, seed, epoch):
            batch = _batch(x, y, rows, extra, mesh)
            state, _ = _step(block, models, config, steps, state, frozen, batch)
            count += 1
            if done is not None:
                done(count, last)
        last, found = held_out_losses(state.trainable)
        _check_finite(last, f"after epoch {epoch + 1}")
        losses.append(last)
        stale = stale + 1 if last >= lowest else 0
        if last < lowest:
            # A copy, for the next step donates its state.
            best, lowest, each = jax.tree.map(jnp.copy, state.trainable), last, found
        if stale >= config.patience:
            break
    by_paths = {n: error for (n, _), error in zip(models, each, strict=False)}
    return Tuned(merge(best, frozen), before, lowest, tuple(losses), by_paths)


def _check(x: Inputs, models: Models, train: int, held_out: int) -> None:
    """Raises BadInput for too few windows, and for inputs of other models than those tuned."""
    numbers, given = [n for n, _ in models], sorted(x) if isinstance(x, Mapping) else []
    if numbers != given:
        raise BadInput(f"the models of {numbers} sign paths are tuned together, and x has inputs "
                       f"of {given}: give those of each model by its number of paths")
    if held_out < 1 or train < 1:
        raise BadInput(
            f"{train + held_out} windows, {held_out} of them held out: tuning needs at least one "
            "to train on and one held out"
        )


def _check_finite(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise BadInput(
            f"the loss of the block is {loss} {when}: lower the learning rate, or look for values "
            "in the model that are not finite"
        )


def _epoch(count: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Batches of window numbers, each window once; the last batch is filled up from the first."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    endless = itertools.cycle(order.tolist())
    for _ in range(-(-count // size)):
        # In ascending order, as a disk reads.
        yield np.sort(list(itertools.islice(endless, size)))


def _batch(
    x: Inputs, y: np.ndarray, rows: slice | np.ndarray, extra: Batch, mesh: Mesh | None
) -> Batch:
    own = {"x": jax.tree.map(lambda a: a[rows], x), "y": y[rows]}
    if mesh is None:
        return {**jax.tree.map(jnp.asarray, own), **extra}
    # The last batch held out may have a number of rows that the mesh does not divide.
    even = len(own["y"]) % row_shards(mesh) == 0
    return {**on_mesh(own, batch_sharding(mesh) if even else replicated(mesh)), **extra}


def relative_error(block: Block, params: Params, batch: Batch) -> Float[Array, ""]:
    """`sum_t |f(x_t) - y_t|^2 / |y_t|^2` over all tokens of a batch, float32."""
    y = batch["y"]
    return summed_hidden_error(block(params, batch)[None], y[None], jnp.ones(y.shape[:-1], bool))


def model_errors(block: Block, models: Models, params: Params, batch: Batch) -> list[Array]:
    """`relative_error` of the model of the first n paths on `batch["x"][n]`, for each n; of the
    whole on `batch["x"]` where there are none."""
    if not models:
        return [relative_error(block, params, batch)]
    return [
        relative_error(block, map_leaves(lambda _, leaf, n=n: narrowed(leaf, n), params),
                       {**batch, "x": batch["x"][n]})
        for n, _ in models
    ]


def _mean(models: Models, errors: Sequence[Array | float]) -> Array | float:
    """The geometric mean of the models' errors, by weight."""
    if not models:
        return errors[0]
    weights = jnp.asarray([w for _, w in models], jnp.float32)
    # An error of 0 has no logarithm; nothing is left to train of such a model.
    logs = jnp.log(jnp.maximum(jnp.stack([jnp.asarray(e, jnp.float32) for e in errors]), 1e-30))
    return jnp.exp(jnp.sum(weights * logs) / jnp.sum(weights))


_errors = partial(jax.jit, static_argnames=("block", "models"))(model_errors)


def _optimizer(config: TuningConfig, steps: int, trainable: Params, frozen: Params):
    """The optimiser, and the roles of what trains."""
    names = roles(merge(trainable, frozen))
    names, _ = partition(names, names, config.optimizer.freeze)
    return make_optimizer(config.optimizer, names, steps), names


@partial(jax.jit, static_argnames=("config", "steps"))
def _start(config: TuningConfig, steps: int, trainable: Params, frozen: Params) -> TrainState:
    return init_state(trainable, _optimizer(config, steps, trainable, frozen)[0])


@partial(jax.jit, static_argnames=("block", "models", "config", "steps"), donate_argnames="state")
def _step(
    block: Block, models: Models, config: TuningConfig, steps: int, state: TrainState,
    frozen: Params, batch: Batch,
) -> tuple[TrainState, Metrics]:
    optimizer, names = _optimizer(config, steps, state.trainable, frozen)

    def loss(params: Params, _: object, batch: Batch) -> Metrics:
        return {"loss": jnp.asarray(_mean(models, model_errors(block, models, params, batch)))}

    def count(batch: Batch) -> Array:
        return jnp.asarray(math.prod(batch["y"].shape[:-1]), jnp.float32)

    return make_step(loss, optimizer, names, count=count)(state, frozen, None, batch)
