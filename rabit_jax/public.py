"""The public names of the library, gathered from the modules that define them.

`rabit_jax` gives these names as its own and imports this module when the first of them is asked
for: JAX and transformers take seconds, and a command has to watch for signals before that.
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
from rabit_jax.signs import Stats, add_ste, effective_weight, svid
from rabit_jax.weights import (
    LLAMA_ENDS,
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
    add_representation,
    convert,
    cost,
    dense,
    describe,
    linear,
    pack,
    residual,
    scaled,
)

__all__ = [
    "LLAMA_ENDS",
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
    "add_representation",
    "add_ste",
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
