"""The decoder of the Llama family for training and for generation."""

from rabit_jax.models.config import ModelConfig, RopeScaling
from rabit_jax.models.decoder import Decoder, init_params, param_shapes
from rabit_jax.models.engine import Engine, init_cache, prepare, step
from rabit_jax.models.generation import generate, stream

__all__ = [
    "Decoder",
    "Engine",
    "ModelConfig",
    "RopeScaling",
    "generate",
    "init_cache",
    "init_params",
    "param_shapes",
    "prepare",
    "step",
    "stream",
]
