"""One optimisation step: gradient accumulation, update, projection of the scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rabit_jax.train.optimizer import merge, project_scales

F32 = jnp.float32

# loss(params, teacher, batch) -> {"loss": sum over tokens, other sums ...}
Loss = Callable[[Any, Any, dict], dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done.
      trainable: params tree with None in place of frozen arrays.
      opt_state: optimiser state over `trainable`.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step, on copies: a step that donates its state must not eat the
    teacher's
    arrays, which a fresh student shares."""
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def real_tokens(batch: dict) -> jax.Array:
    """Number of real tokens of a batch, float32 scalar: what a distillation loss sums over."""
    mask = batch.get("mask")
    return jnp.asarray(batch["tokens"].size, F32) if mask is None else jnp.sum(mask, dtype=F32)


def next_tokens(batch: dict) -> jax.Array:
    """Number of neighbouring pairs of real tokens, float32 scalar: what a language-model loss sums
    over."""
    tokens, mask = batch["tokens"], batch.get("mask")
    if mask is None:
        return jnp.asarray(tokens[:, 1:].size, F32)
    return jnp.sum(mask[:, 1:] & mask[:, :-1], dtype=F32)


def gradients(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    teacher: Any,
    batch: dict,
    accumulate: int,
    count: Callable[[dict], jax.Array] = real_tokens,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the per-token loss of a whole batch, in `accumulate` equal pieces one after
    another.

    Sums are divided by `count` of the whole batch, so the pieces add up to the gradient of the
    batch taken at once, ragged or not.

    Returns:
      `(gradients, metrics)`; metrics are per-token means.
    """
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
    names: Any,
    *,
    accumulate: int = 1,
    project: bool = True,
    count: Callable[[dict], jax.Array] = real_tokens,
) -> Callable:
    """Build `step(state, frozen, teacher, batch) -> (state, metrics)`, to be jitted by the caller.

    Args:
      loss: sums over the tokens of a batch, see `Loss`.
      optimizer: over the trainable tree.
      names: roles of the trainable tree.
      accumulate: pieces the batch is cut into.
      project: keep scales positive after the update.
      count: what the sums of a batch are divided by.

    Returns:
      The step function; metrics are per-token means, `grad_norm` before clipping and, with
      `project`, `projected` (scales moved by the projection).
    """

    def step(state: TrainState, frozen: Any, teacher: Any, batch: dict) -> tuple[TrainState, dict]:
        grads, metrics = gradients(loss, state.trainable, frozen, teacher, batch, accumulate, count)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if project:
            trainable, metrics["projected"] = project_scales(trainable, names)
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step
