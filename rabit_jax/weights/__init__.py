"""Weight representations, and the pure functions that map params trees to params trees."""

from rabit_jax.types import Spec, Weight
from rabit_jax.weights.codebook import Codebook, CodebookSpec
from rabit_jax.weights.conversion import LLAMA_ENDS, LLAMA_LINEARS, convert, dense, pack
from rabit_jax.weights.costs import Cost, cost
from rabit_jax.weights.description import describe
from rabit_jax.weights.dual_binary import DualBinary, DualBinarySpec
from rabit_jax.weights.frozen_path import FrozenPath, FrozenPathSpec
from rabit_jax.weights.group_uniform import GroupUniform, GroupUniformSpec
from rabit_jax.weights.grouped_sign import GroupedSign
from rabit_jax.weights.independent_sign import IndependentSign, IndependentSignSpec
from rabit_jax.weights.low_rank_sign import LowRankSign, LowRankSignSpec, rank_for_bits
from rabit_jax.weights.representations import SPECS, add_representation
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.residual_sign import ResidualSign, ResidualSignSpec
from rabit_jax.weights.rounding import round_to_nearest
from rabit_jax.weights.scaled_weight import ScaledSpec, ScaledWeight, scaled
from rabit_jax.weights.seam import linear
from rabit_jax.weights.sign_paths import PackedSign
from rabit_jax.weights.sum_weight import SumSpec, SumWeight, residual
from rabit_jax.weights.table import Table
from rabit_jax.weights.uniform_residual import UniformResidual, UniformResidualSpec
from rabit_jax.weights.uniform_sign import UniformSign

__all__ = [
    "LLAMA_ENDS",
    "LLAMA_LINEARS",
    "SPECS",
    "Codebook",
    "CodebookSpec",
    "Cost",
    "DualBinary",
    "DualBinarySpec",
    "FrozenPath",
    "FrozenPathSpec",
    "GroupUniform",
    "GroupUniformSpec",
    "GroupedSign",
    "IndependentSign",
    "IndependentSignSpec",
    "LowRankSign",
    "LowRankSignSpec",
    "PackedSign",
    "Reshaped",
    "ResidualSign",
    "ResidualSignSpec",
    "ScaledSpec",
    "ScaledWeight",
    "Spec",
    "SumSpec",
    "SumWeight",
    "Table",
    "UniformResidual",
    "UniformResidualSpec",
    "UniformSign",
    "Weight",
    "add_representation",
    "convert",
    "cost",
    "dense",
    "describe",
    "linear",
    "pack",
    "rank_for_bits",
    "residual",
    "round_to_nearest",
    "scaled",
]
