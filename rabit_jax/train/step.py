"""One optimisation step: gradient accumulation, update, projection of the scales."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, PyTree

from rabit_jax.errors import BadInput
from rabit_jax.train.health import Health, first_mean, next_mean, tested, unwatched, watched
from rabit_jax.train.optimizer import apply_updates, merge, project_scales
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array, Batch, Params

F32 = jnp.float32

Metrics = dict[str, Float[Array, ""]]
# loss(params, teacher, batch) -> {"loss": sum over tokens, other sums ...}; the teacher may be None
Loss = Callable[[Params, PyTree, Batch], Metrics]


@pytree_dataclass
class TrainState:
    """The state that a step updates and a checkpoint holds.

    Attributes:
      step: int32 scalar, number of steps done.
      trainable: params tree with None in place of frozen arrays.
      opt_state: optimiser state over `trainable`; a `Watched` one where spikes are looked for.
    """

    step: Array
    trainable: Params
    opt_state: optax.OptState


# `step(state, frozen, teacher, batch) -> (state, metrics)`
Step = Callable[[TrainState, Params, Params | None, Batch], tuple[TrainState, Metrics]]


def init_state(
    trainable: Params, optimizer: optax.GradientTransformation, health: Health | None = None
) -> TrainState:
    """The state before the first step.

    It holds copies, because a step that donates its state must not delete the teacher's arrays,
    which a new student shares.
    """
    trainable = jax.tree.map(jnp.copy, trainable)
    opt_state = watched(optimizer.init(trainable), first_mean(health))
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state)


def real_tokens(batch: Batch) -> Float[Array, ""]:
    """Number of real tokens of a batch, the terms of a distillation loss."""
    mask = batch.get("mask")
    return jnp.asarray(batch["tokens"].size, F32) if mask is None else jnp.sum(mask, dtype=F32)


def next_tokens(batch: Batch) -> Float[Array, ""]:
    """Number of adjacent pairs of real tokens of a batch, the terms of a language-model loss."""
    tokens, mask = batch["tokens"], batch.get("mask")
    if mask is None:
        return jnp.asarray(tokens[:, 1:].size, F32)
    return jnp.sum(mask[:, 1:] & mask[:, :-1], dtype=F32)


def gradients(
    loss: Loss,
    trainable: Params,
    frozen: Params,
    teacher: Params | None,
    batch: Batch,
    accumulate: int,
    count: Callable[[Batch], Float[Array, ""]] = real_tokens,
) -> tuple[Params, Metrics]:
    """Gradient of the per-token loss of a batch, accumulated over `accumulate` equal pieces.

    Sums are divided by `count` of the whole batch, so the pieces add up to the gradient of the
    whole batch even if they have different numbers of real tokens.

    Returns:
      `(gradients, metrics)`; metrics are per-token means.

    Raises:
      BadInput: `accumulate` does not divide the rows of the batch.
    """
    rows = len(jax.tree.leaves(batch)[0]) if accumulate > 1 else 0
    if rows % accumulate:
        raise BadInput(
            f"accumulate is {accumulate} for a batch of {rows} rows: it must divide them")
    total = count(batch)

    def piece(trainable, part):
        sums = loss(merge(trainable, frozen), teacher, part)
        means = jax.tree.map(lambda s: s / total, sums)
        return means["loss"], means

    grad = jax.grad(piece, has_aux=True)
    if accumulate == 1:
        return grad(trainable, batch)
    # Rows r, r + accumulate, ... form a piece, so that each keeps its share of every device.
    parts = jax.tree.map(lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(grad, trainable, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, F32), shapes)

    def add(carry, part):
        return jax.tree.map(jnp.add, carry, grad(trainable, part)), None

    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    names: PyTree[str],
    *,
    accumulate: int = 1,
    project: bool = True,
    count: Callable[[Batch], Float[Array, ""]] = real_tokens,
    health: Health | None = None,
) -> Step:
    """Build `step(state, frozen, teacher, batch) -> (state, metrics)`, to be jitted by the caller.

    Args:
      loss: sums over the tokens of a batch, see `Loss`.
      optimizer: over the trainable tree.
      names: roles of the trainable tree.
      accumulate: number of pieces that the batch is cut into.
      project: keep scales positive after the update.
      count: number by which the sums of a batch are divided.
      health: tests of each step, see `rabit_jax.train.health`; None tests nothing.

    Returns:
      The step function; metrics are per-token means, `grad_norm` before clipping and, with
      `project`, `projected` (scales moved by the projection); with `health` the scalars of
      `health.tested`, and where steps may be skipped `skipped` (0 or 1), and where they may be
      skipped or rolled back `updates`, how many the optimiser has made, which its schedule counts.
    """

    def step(
        state: TrainState, frozen: Params, teacher: Params | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(loss, state.trainable, frozen, teacher, batch, accumulate, count)
        with jax.named_scope("optimizer"):
            before, mean = unwatched(state.opt_state)
            updates, opt_state = optimizer.update(grads, before, state.trainable)
            trainable: Params = apply_updates(state.trainable, updates, state.step)
            metrics["grad_norm"] = optax.tree.norm(grads)
            if project:
                trainable, metrics["projected"] = project_scales(trainable, names)
        done = state.step + 1
        if health is None:
            return TrainState(done, trainable, opt_state), metrics
        with jax.named_scope("health"):
            found = tested(health, metrics["loss"], mean, grads, state.trainable, trainable,
                           frozen, names)
            metrics |= found.metrics
            mean = next_mean(mean, metrics["loss"], found.healthy)
            if health.skips:
                trainable, opt_state = jax.tree.map(
                    lambda old, new: jnp.where(found.skip, old, new),
                    (state.trainable, before), (trainable, opt_state))
                metrics["skipped"] = found.skip.astype(jnp.int32)
            if health.repairs:
                metrics["updates"] = _updates(opt_state)
        return TrainState(done, trainable, watched(opt_state, mean)), metrics

    return step


def _updates(opt_state: optax.OptState) -> Array:
    """The number of updates that an optimiser has made, the largest of its counts."""
    return jnp.max(jnp.stack([n for _, n in optax.tree.get_all_with_path(opt_state, "count")]))
