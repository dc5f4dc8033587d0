"""`make_trainer`: params, loss and optimiser settings to a jitted, sharded step and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from rabit_jax.errors import BadInput
from rabit_jax.train.optimizer import (
    OptimizerConfig,
    learning_rate,
    make_optimizer,
    merge,
    partition,
    roles,
)
from rabit_jax.train.sharding import (
    batch_sharding,
    like_params,
    make_mesh,
    param_shardings,
    replicated,
)
from rabit_jax.train.step import Loss, TrainState, init_state, make_step, real_tokens


@dataclass(frozen=True)
class Trainer:
    """A step and what it runs on.

    Attributes:
      step: jitted `(state, frozen, teacher, batch) -> (state, metrics)`; donates its state.
      state: state before the first step.
      frozen: params that do not train, None where others do.
      teacher: params of the teacher, or None.
      place: puts a host batch on the mesh, rows over `data`.
      schedule: step -> learning rate of the matrices.
    """

    step: Callable
    state: TrainState
    frozen: Any = field(repr=False)
    teacher: Any = field(repr=False)
    place: Callable[[dict], dict]
    schedule: Callable[[int], Any]

    def params(self, state: TrainState) -> Any:
        """The whole params tree of a state."""
        return merge(state.trainable, self.frozen)


def make_trainer(
    loss: Loss,
    params: Any,
    config: OptimizerConfig,
    steps: int,
    *,
    teacher: Any = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    project: bool = True,
    count: Callable[[dict], jax.Array] = real_tokens,
) -> Trainer:
    """Build the trainer of any params tree with weight nodes, arrays, or both.

    Args:
      loss: `loss(params, teacher, batch) -> {"loss": sum over tokens, ...}`.
      params: initial params; they are copied, never donated.
      config: optimiser and what it freezes.
      steps: length of the schedule.
      teacher: params handed to the loss.
      mesh: devices; None takes all of them on `data`.
      accumulate: pieces each batch is cut into.
      project: keep scales positive after each update.
      count: what the loss's sums are divided by.

    Raises:
      BadInput: everything is frozen.

    Example:
      >>> loss = lambda p, t, batch: distillation_loss(model, p, t, batch, gamma=1.0)
      >>> trainer = make_trainer(loss, student, OptimizerConfig(lr=1e-3), 300, teacher=teacher)
      >>> state, metrics = trainer.step(trainer.state, trainer.frozen, trainer.teacher, batch)
    """
    mesh = make_mesh() if mesh is None else mesh
    names = roles(params)
    placed = jax.device_put(params, param_shardings(params, mesh))
    trainable, frozen = partition(placed, names, config.freeze)
    if not jax.tree.leaves(trainable):
        raise BadInput(
            f"freeze {list(config.freeze)} leaves nothing to train: remove a role from it"
        )
    names, _ = partition(names, names, config.freeze)
    where, frozen_where = partition(param_shardings(params, mesh), roles(params), config.freeze)
    optimizer = make_optimizer(config, names, steps)
    whole = replicated(mesh)
    shape = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    state_where = TrainState(
        step=whole, trainable=where, opt_state=like_params(shape.opt_state, trainable, where, mesh)
    )
    state = jax.jit(lambda tree: init_state(tree, optimizer), out_shardings=state_where)(trainable)
    step = jax.jit(
        make_step(loss, optimizer, names, accumulate=accumulate, project=project, count=count),
        in_shardings=(state_where, frozen_where, None, batch_sharding(mesh)),
        out_shardings=(state_where, whole),
        donate_argnums=0,
    )
    if teacher is not None:
        teacher = jax.device_put(teacher, param_shardings(teacher, mesh))
    return Trainer(
        step,
        state,
        frozen,
        teacher,
        place=lambda batch: jax.device_put(batch, batch_sharding(mesh)),
        schedule=learning_rate(config, config.lr, steps),
    )
