"""Residual binarisation of large language models in JAX.

A 2-bit model is a sum of sign matrices with row and column scales,
`W_hat = sum_i diag(h_i) B_i diag(g_i)`, whose paths are all derived from one latent weight.

The params tree is the model state; a weight is a small pytree that knows how to multiply;
everything here is a pure function over the tree.
"""

from rabit_jax.calibration import calibrate, calibrate_flax
from rabit_jax.errors import BadInput
from rabit_jax.formats import (
    load_hf,
    load_model,
    load_packed_params,
    save_hf,
    save_packed_params,
)
from rabit_jax.models import generate
from rabit_jax.signs import Stats, effective_weight, svid
from rabit_jax.weights import (
    LLAMA_LINEARS,
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSign,
    IndependentSignSpec,
    LowRankSignSpec,
    PackedSign,
    ResidualSign,
    ResidualSignSpec,
    UniformResidualSpec,
    Weight,
    convert,
    cost,
    dense,
    describe,
    linear,
    pack,
    residual,
    scaled,
)

__version__ = "0.1.0"

__all__ = [
    "LLAMA_LINEARS",
    "BadInput",
    "CodebookSpec",
    "DualBinarySpec",
    "FrozenPathSpec",
    "GroupUniformSpec",
    "IndependentSign",
    "IndependentSignSpec",
    "LowRankSignSpec",
    "PackedSign",
    "ResidualSign",
    "ResidualSignSpec",
    "Stats",
    "UniformResidualSpec",
    "Weight",
    "calibrate",
    "calibrate_flax",
    "convert",
    "cost",
    "dense",
    "describe",
    "effective_weight",
    "generate",
    "linear",
    "load_hf",
    "load_model",
    "load_packed_params",
    "pack",
    "residual",
    "save_hf",
    "save_packed_params",
    "scaled",
    "svid",
]
