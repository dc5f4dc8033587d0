"""The Flax decoder of the Llama family, its Hugging Face import and export, and generation."""

from rabit_jax.models.config import ModelConfig, RopeScaling, from_hf, to_hf
from rabit_jax.models.decode import generate, stream
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.models.engine import Engine, init_cache, prepare, step
from rabit_jax.models.folder import find_folder
from rabit_jax.models.hf import load_hf, read_config, save_hf
from rabit_jax.models.names import hf_name, param_shapes, tensor_names
from rabit_jax.models.packed_io import load_model, load_packed, packed_bytes, save_packed

__all__ = [
    "Decoder",
    "Engine",
    "ModelConfig",
    "RopeScaling",
    "find_folder",
    "from_hf",
    "generate",
    "hf_name",
    "init_cache",
    "init_params",
    "load_hf",
    "load_model",
    "load_packed",
    "packed_bytes",
    "param_shapes",
    "prepare",
    "read_config",
    "save_hf",
    "save_packed",
    "step",
    "stream",
    "tensor_names",
    "to_hf",
]
