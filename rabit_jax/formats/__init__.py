"""Models in folders and files: Hugging Face checkpoints, packed models, tokenizers, the hub."""

from rabit_jax.formats.checkpoint import Checkpoint, open_checkpoint
from rabit_jax.formats.hf import load_hf, save_hf
from rabit_jax.formats.hf_config import from_hf, to_hf
from rabit_jax.formats.packed_file import load_packed_params, save_packed_params
from rabit_jax.formats.packed_model import load_model, load_packed, packed_bytes, save_packed
from rabit_jax.formats.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "Checkpoint",
    "from_hf",
    "load_hf",
    "load_model",
    "load_packed",
    "load_packed_params",
    "load_tokenizer",
    "open_checkpoint",
    "packed_bytes",
    "save_hf",
    "save_packed",
    "save_packed_params",
    "save_tokenizer",
    "to_hf",
]
