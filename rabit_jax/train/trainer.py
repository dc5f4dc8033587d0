"""The trainer: a jitted, sharded training step with its initial state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.hosts import on_mesh
from rabit_jax.train.checkpoints import abstract
from rabit_jax.train.health import Health, HealthConfig, make_health
from rabit_jax.train.optimizer import (
    OptimizerConfig,
    check_moments,
    learning_rate,
    make_optimizer,
    merge,
    partition,
    roles,
)
from rabit_jax.train.sharding import (
    batch_sharding,
    layer_by_layer,
    like_params,
    make_mesh,
    param_shardings,
    replicated,
    row_shards,
)
from rabit_jax.train.step import Loss, Step, TrainState, init_state, make_step, real_tokens
from rabit_jax.types import Array, Batch, Params

DEFAULT = HealthConfig()


@dataclass(frozen=True)
class Trainer:
    """A jitted training step with its initial state.

    Attributes:
      step: jitted `(state, frozen, teacher, batch) -> (state, metrics)`; donates its state.
      state: state before the first step.
      frozen: params that do not train, with None in place of those that do.
      teacher: params of the teacher, or None.
      place: puts a host batch on the mesh, rows split over `data` and `fsdp`; raises BadInput where
        these do not divide them.
      schedule: step -> learning rate of the matrices.
      health: what each step is tested for.
    """

    step: Step
    state: TrainState
    frozen: Params = field(repr=False)
    teacher: Params | None = field(repr=False)
    place: Callable[[Mapping[str, ArrayLike]], Batch]
    schedule: optax.Schedule
    health: Health | None = None

    def params(self, state: TrainState) -> Params:
        """The full params tree of a state, trainable and frozen."""
        return merge(state.trainable, self.frozen)


def make_trainer(
    loss: Loss,
    params: Params,
    config: OptimizerConfig,
    steps: int,
    *,
    teacher: Params | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    project: bool = True,
    count: Callable[[Batch], Float[Array, ""]] = real_tokens,
    health: HealthConfig = DEFAULT,
) -> Trainer:
    """Build a trainer for any params tree of weight nodes, arrays, or both.

    Args:
      loss: `loss(params, teacher, batch) -> {"loss": sum over tokens, ...}`.
      params: initial params; they are copied, never donated.
      config: settings of the optimiser, with the roles that are frozen.
      steps: length of the schedule.
      teacher: params of the teacher, passed to the loss.
      mesh: devices; None puts all devices on the axis `data`.
      accumulate: number of pieces that each batch is cut into.
      project: keep scales positive after each update.
      count: number by which the sums of a batch are divided.
      health: what each step is tested for, and what is done about a fault; give `Trainer.health`
        to the loop, which does it.

    Raises:
      BadInput: everything is frozen, or what `check_moments` refuses.

    Example:
      >>> loss = lambda p, t, batch: distillation_loss(model, p, t, batch, gamma=1.0)
      >>> trainer = make_trainer(loss, student, OptimizerConfig(lr=1e-3), 300, teacher=teacher)
      >>> state, metrics = trainer.step(trainer.state, trainer.frozen, trainer.teacher, batch)
    """
    mesh = make_mesh() if mesh is None else mesh
    program = make_program(loss, params, config, steps, mesh=mesh, accumulate=accumulate,
                           project=project, count=count, health=health)
    placed = on_mesh(params, param_shardings(params, mesh))
    trainable, frozen = partition(placed, roles(params), config.freeze)
    if teacher is not None:
        teacher = on_mesh(teacher, param_shardings(teacher, mesh))
    parts = row_shards(mesh)

    def place(batch: Mapping[str, ArrayLike]) -> Batch:
        for name, array in batch.items():
            if np.shape(array)[0] % parts:
                raise BadInput(
                    f"the batch has {np.shape(array)[0]} rows of {name} for {parts} parts of the "
                    f"mesh (data x fsdp): make it a multiple of {parts}")
        return on_mesh(batch, batch_sharding(mesh))

    return Trainer(
        program.step,
        program.init(trainable),
        frozen,
        teacher,
        place=place,
        schedule=learning_rate(config, config.lr, steps),
        health=program.health,
    )


@dataclass(frozen=True)
class Program:
    """The compiled functions of a training, and the shapes that they take.

    Attributes:
      step: jitted `(state, frozen, teacher, batch) -> (state, metrics)`; donates its state.
      init: jitted `trainable -> state`.
      state: shapes and shardings of the state.
      frozen: shapes and shardings of the params that do not train.
      health: what each step is tested for.
    """

    step: Step
    init: Callable[[Params], TrainState]
    state: TrainState
    frozen: Params
    health: Health


def make_program(
    loss: Loss,
    params: Params,
    config: OptimizerConfig,
    steps: int,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    project: bool = True,
    count: Callable[[Batch], Float[Array, ""]] = real_tokens,
    health: HealthConfig = DEFAULT,
) -> Program:
    """The functions of `make_trainer`, for params that may be shapes alone (`jax.eval_shape`).

    So a training can be compiled where neither its weights nor its devices are.

    Raises:
      BadInput: everything is frozen, or what `check_moments` refuses.
    """
    names = roles(params)
    trainable, frozen = partition(params, names, config.freeze)
    if not jax.tree.leaves(trainable):
        raise BadInput(
            f"freeze {list(config.freeze)} leaves nothing to train: remove a role from it"
        )
    where, frozen_where = partition(param_shardings(params, mesh), names, config.freeze)
    names, _ = partition(names, names, config.freeze)
    check_moments(config, trainable, names)
    optimizer = make_optimizer(
        config, names, steps, lambda transform: layer_by_layer(transform, trainable, where, mesh))
    tests = make_health(health, trainable, names)
    whole = replicated(mesh)
    shape = jax.eval_shape(lambda tree: init_state(tree, optimizer, tests), trainable)
    state_where = TrainState(
        step=cast(Array, whole), trainable=where,
        opt_state=like_params(shape.opt_state, trainable, where, mesh),
    )
    init = jax.jit(lambda tree: init_state(tree, optimizer, tests), out_shardings=state_where)
    step = jax.jit(
        make_step(loss, optimizer, names, accumulate=accumulate, project=project, count=count,
                  health=tests),
        in_shardings=(state_where, frozen_where, None, batch_sharding(mesh)),
        out_shardings=(state_where, whole),
        donate_argnums=0,
    )
    return Program(step, init, abstract(shape, state_where), abstract(frozen, frozen_where), tests)
