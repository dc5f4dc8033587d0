"""Residual binarisation of large language models in JAX.

A 2-bit model is a sum of sign matrices with row and column scales,
`W_hat = sum_i diag(h_i) B_i diag(g_i)`, whose paths are all derived from one latent weight.

The params tree is the model state; a weight is a small pytree that knows how to multiply;
everything here is a pure function over the tree.
"""

from pathlib import Path

# Installed, `kernels` and `experiments` lie in this folder; in a checkout they lie beside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from rabit_jax.errors import BadInput
from rabit_jax.init import (
    CodebookSpec,
    DualBinarySpec,
    FrozenPathSpec,
    GroupUniformSpec,
    IndependentSignSpec,
    LowRankSignSpec,
    ResidualSignSpec,
    Stats,
    UniformResidualSpec,
    calibrate,
    calibrate_flax,
    residual,
    scaled,
    svid,
)
from rabit_jax.models import (
    generate,
    load_hf,
    load_model,
    load_packed_params,
    save_hf,
    save_packed_params,
)
from rabit_jax.weights import (
    LLAMA_LINEARS,
    IndependentSign,
    PackedSign,
    ResidualSign,
    Weight,
    convert,
    cost,
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
