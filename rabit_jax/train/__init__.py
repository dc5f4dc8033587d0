"""Training: losses, optimisers by role, the step, the loop, checkpoints and sharding."""

from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, Watch, train
from rabit_jax.train.losses import distillation_loss, next_token_loss
from rabit_jax.train.optimizer import OptimizerConfig, make_optimizer, merge, partition, roles
from rabit_jax.train.step import TrainState, init_state, make_step

__all__ = [
    "Checkpoints", "Loop", "OptimizerConfig", "TrainState", "Watch", "abstract", "distillation_loss",
    "init_state", "make_optimizer", "make_step", "merge", "next_token_loss", "partition", "roles", "train",
]
