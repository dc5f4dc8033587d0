"""Training: losses, optimisers by role, the step, the loop, checkpoints and sharding."""

from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, Watch, train
from rabit_jax.train.losses import distillation_loss, next_token_loss
from rabit_jax.train.optimizer import OptimizerConfig, make_optimizer, merge, partition, roles
from rabit_jax.train.step import TrainState, init_state, make_step, next_tokens, real_tokens
from rabit_jax.train.trainer import Trainer, make_trainer

__all__ = [
    "Checkpoints",
    "Loop",
    "OptimizerConfig",
    "TrainState",
    "Trainer",
    "Watch",
    "abstract",
    "distillation_loss",
    "init_state",
    "make_optimizer",
    "make_step",
    "make_trainer",
    "merge",
    "next_token_loss",
    "next_tokens",
    "partition",
    "real_tokens",
    "roles",
    "train",
]
