"""Model folders in and out: Hugging Face checkpoints, packed files, tokenizers, the hub, cards."""

from rabit_jax.formats.checkpoint import Checkpoint, open_checkpoint, read_config
from rabit_jax.formats.families import hf_name, tensor_names
from rabit_jax.formats.folder import find_folder
from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.formats.packed_file import load_packed_params, save_packed_params
from rabit_jax.formats.packed_model import load_model, load_packed, packed_bytes, save_packed
from rabit_jax.formats.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "Checkpoint",
    "find_folder",
    "from_hf",
    "hf_name",
    "load_hf",
    "load_model",
    "load_packed",
    "load_packed_params",
    "load_tokenizer",
    "open_checkpoint",
    "packed_bytes",
    "read_config",
    "save_hf",
    "save_packed",
    "save_packed_params",
    "save_tokenizer",
    "tensor_names",
    "to_hf",
]
