"""Training: losses, optimisers by role, the step, the loop, checkpoints and sharding."""

from rabit_jax.train.checkpoints import Checkpoints, abstract
from rabit_jax.train.loop import Loop, Watch, train
from rabit_jax.train.losses import distillation_loss, next_token_loss
from rabit_jax.train.optimizer import OptimizerConfig
from rabit_jax.train.sharding import batch_sharding, make_mesh, param_shardings
from rabit_jax.train.step import TrainState, next_tokens, real_tokens
from rabit_jax.train.trainer import Trainer, make_trainer

__all__ = [
    "Checkpoints",
    "Loop",
    "OptimizerConfig",
    "TrainState",
    "Trainer",
    "Watch",
    "abstract",
    "batch_sharding",
    "distillation_loss",
    "make_mesh",
    "make_trainer",
    "next_token_loss",
    "next_tokens",
    "param_shardings",
    "real_tokens",
    "train",
]
