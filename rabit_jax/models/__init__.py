"""The Flax decoder of the Llama family, its Hugging Face import and export, and generation."""

from rabit_jax.models.checkpoint import Checkpoint, open_checkpoint, read_config
from rabit_jax.models.config import ModelConfig, RopeScaling
from rabit_jax.models.config_hf import from_hf
from rabit_jax.models.config_to_hf import to_hf
from rabit_jax.models.decode import generate, stream
from rabit_jax.models.decoder import Decoder, init_params
from rabit_jax.models.engine import Engine, init_cache, prepare, step
from rabit_jax.models.folder import find_folder
from rabit_jax.models.hf import load_hf, save_hf
from rabit_jax.models.names import hf_name, param_shapes, tensor_names
from rabit_jax.models.packed_io import load_model, load_packed, packed_bytes, save_packed
from rabit_jax.models.packed_params import load_packed_params, save_packed_params

__all__ = [
    "Checkpoint",
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
    "load_packed_params",
    "open_checkpoint",
    "packed_bytes",
    "param_shapes",
    "prepare",
    "read_config",
    "save_hf",
    "save_packed",
    "save_packed_params",
    "step",
    "stream",
    "tensor_names",
    "to_hf",
]
