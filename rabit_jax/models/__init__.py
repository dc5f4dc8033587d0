"""The Flax decoder of the Llama family, its Hugging Face import and export, and generation."""

from rabit_jax.models.config import ModelConfig, RopeScaling, from_hf, to_hf
from rabit_jax.models.decode import generate
from rabit_jax.models.decoder import Decoder, init_cache, init_params
from rabit_jax.models.hf import load_hf, load_tokenizer, save_hf
from rabit_jax.models.names import hf_name, param_shapes, tensor_names

__all__ = [
    "Decoder", "ModelConfig", "RopeScaling", "from_hf", "generate", "hf_name", "init_cache",
    "init_params", "load_hf", "load_tokenizer", "param_shapes", "save_hf", "tensor_names",
    "to_hf",
]
