"""Residual binarisation of large language models in JAX.

A 2-bit model is a sum of sign matrices with row and column scales,
`W_hat = sum_i diag(h_i) B_i diag(g_i)`, whose paths are all derived from one latent weight.

The params tree is the model state; a weight is a small pytree that knows how to multiply;
everything here is a pure function over the tree.
"""

from rabit_jax.errors import BadInput
from rabit_jax.init import IndependentSignSpec, ResidualSignSpec, Stats, calibrate, svid
from rabit_jax.models import generate, load_hf, load_model, save_hf
from rabit_jax.weights import (
    LLAMA_LINEARS,
    IndependentSign,
    PackedSign,
    ResidualSign,
    Weight,
    convert,
    dense,
    describe,
    effective_weight,
    linear,
    pack,
)

__version__ = "0.1.0"

__all__ = [
    "LLAMA_LINEARS",
    "BadInput",
    "IndependentSign",
    "IndependentSignSpec",
    "PackedSign",
    "ResidualSign",
    "ResidualSignSpec",
    "Stats",
    "Weight",
    "calibrate",
    "convert",
    "dense",
    "describe",
    "effective_weight",
    "generate",
    "linear",
    "load_hf",
    "load_model",
    "pack",
    "save_hf",
    "svid",
]
