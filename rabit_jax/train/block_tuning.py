"""Tuning of one block of a model on its output, whatever its weights are represented by.

A quantised block f is trained to give what the full-precision block gives at the same place,

    loss = mean_t |f(x_t) - y_t|^2 / |y_t|^2,

relative to y token by token, as the residual stream of a few tokens is a thousand times larger than
that of the others. With x from the blocks before it as they are once quantised, each block makes up
for the errors of its prefix. What trains follows from the roles of the leaves. Sources: Block-AP of
EfficientQAT (arXiv 2407.11062), OmniQuant (arXiv 2308.13137).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
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
from rabit_jax.train.optimizer import OptimizerConfig, make_optimizer, merge, partition, roles
from rabit_jax.train.sharding import batch_sharding, like_params, replicated, row_shards
from rabit_jax.train.step import Metrics, TrainState, init_state, make_step
from rabit_jax.types import Array, Batch, Params

# `block(params, batch) -> [b, t, d]`; a batch has the input "x: [b, t, d]", the wanted output "y",
# and whatever else the block reads.
Block = Callable[[Params, Batch], Array]


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
    """

    params: Params
    before: float
    after: float
    losses: tuple[float, ...]


def tune_block(
    block: Block,
    params: Params,
    x: Float[np.ndarray, "n t d"],
    y: Float[np.ndarray, "n t d"],
    config: TuningConfig,
    held_out: int,
    seed: int = 0,
    extra: Mapping[str, Array] | None = None,
    done: Callable[[int, float], None] | None = None,
    mesh: Mesh | None = None,
) -> Tuned:
    """Trains the weight nodes of one block, with its norms, so that `block(params, x)` comes to y.

    One compiled step serves all blocks whose params have the same shapes, where `block` is the same
    function.

    Args:
      block: `block(params, batch) -> output [b, t, d]`; `batch["x"]` is its input. It multiplies
        by `linear(x, w)`.
      params: of this block: weight nodes with latents, and arrays.
      x: inputs of all windows; may be a memory map, of which a batch is read at a time.
      y: outputs of the full-precision block, from its own inputs.
      config: settings.
      held_out: the last so many windows choose the epoch and are not trained on.
      seed: of the order of windows.
      extra: what else `block` reads from a batch, the same for all.
      done: called after each step with the number of steps done and the loss on held-out windows.
      mesh: that `params` lie on, with batches by rows; None for one device. Of several processes
        each reads the same x and y.

    Raises:
      BadInput: settings that leave nothing to train or nothing held out, or a loss that is not
        finite.

    Example:
      >>> tuned = tune_block(run, params, x, y, TuningConfig(epochs=4), held_out=8)
      >>> tuned.after <= tuned.before
      True
    """
    extra, train = dict(extra or {}), len(x) - held_out
    _check(config, train, held_out)
    steps_each = -(-train // config.batch_size)
    steps = config.epochs * steps_each
    freeze = config.optimizer.freeze
    names = roles(params)
    trainable, frozen = partition(params, names, freeze)
    if not jax.tree.leaves(trainable):
        raise BadInput(f"freeze {list(freeze)} leaves nothing of a block to train")
    state = _start(config, steps, trainable, frozen)
    if mesh is not None:
        where = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        opt_state = like_params(state.opt_state, trainable, where, mesh)
        state = on_mesh(state, TrainState(replicated(mesh), where, opt_state))  # pyright: ignore

    def held_out_loss(trainable: Params) -> float:
        starts = range(train, len(x), config.batch_size)
        rows = (slice(start, start + config.batch_size) for start in starts)
        sums = [_error(block, merge(trainable, frozen), _batch(x, y, r, extra, mesh)) for r in rows]
        return float(sum(sums)) / (held_out * x.shape[1])

    best, losses = trainable, []
    before = lowest = last = held_out_loss(trainable)
    _check_finite(before, "before the first step")
    count, stale = 0, 0
    for epoch in range(config.epochs):
        for rows in _epoch(train, config.batch_size, seed, epoch):
            batch = _batch(x, y, rows, extra, mesh)
            state, _ = _step(block, config, steps, state, frozen, batch)
            count += 1
            if done is not None:
                done(count, last)
        last = held_out_loss(state.trainable)
        _check_finite(last, f"after epoch {epoch + 1}")
        losses.append(last)
        stale = stale + 1 if last >= lowest else 0
        if last < lowest:
            # A copy, for the next step donates its state.
            best, lowest = jax.tree.map(jnp.copy, state.trainable), last
        if stale >= config.patience:
            break
    return Tuned(merge(best, frozen), before, lowest, tuple(losses))


def _check(config: TuningConfig, train: int, held_out: int) -> None:
    """Raises BadInput for too few windows."""
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
    x: np.ndarray, y: np.ndarray, rows: slice | np.ndarray, extra: Batch, mesh: Mesh | None
) -> Batch:
    own = {"x": x[rows], "y": y[rows]}
    if mesh is None:
        return {**jax.tree.map(jnp.asarray, own), **extra}
    # The last batch held out may have a number of rows that the mesh does not divide.
    even = len(own["x"]) % row_shards(mesh) == 0
    return {**on_mesh(own, batch_sharding(mesh) if even else replicated(mesh)), **extra}


def relative_error(block: Block, params: Params, batch: Batch) -> Float[Array, ""]:
    """`sum_t |f(x_t) - y_t|^2 / |y_t|^2` over all tokens of a batch, float32."""
    y = batch["y"]
    return summed_hidden_error(block(params, batch)[None], y[None], jnp.ones(y.shape[:-1], bool))


_error = partial(jax.jit, static_argnames="block")(relative_error)


def _optimizer(config: TuningConfig, steps: int, trainable: Params, frozen: Params):
    """The optimiser, and the roles of what trains."""
    names = roles(merge(trainable, frozen))
    names, _ = partition(names, names, config.optimizer.freeze)
    return make_optimizer(config.optimizer, names, steps), names


@partial(jax.jit, static_argnames=("config", "steps"))
def _start(config: TuningConfig, steps: int, trainable: Params, frozen: Params) -> TrainState:
    return init_state(trainable, _optimizer(config, steps, trainable, frozen)[0])


@partial(jax.jit, static_argnames=("block", "config", "steps"), donate_argnames="state")
def _step(
    block: Block, config: TuningConfig, steps: int, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, Metrics]:
    optimizer, names = _optimizer(config, steps, state.trainable, frozen)

    def loss(params: Params, _: object, batch: Batch) -> Metrics:
        return {"loss": relative_error(block, params, batch)}

    def count(batch: Batch) -> Array:
        return jnp.asarray(math.prod(batch["y"].shape[:-1]), jnp.float32)

    return make_step(loss, optimizer, names, count=count)(state, frozen, None, batch)
