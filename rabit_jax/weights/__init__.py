"""Weight representations and the pure functions that map params trees to params trees."""

from rabit_jax.weights.codebook import Codebook
from rabit_jax.weights.convert import LLAMA_LINEARS, convert, dense, match_rules, pack, weights_of
from rabit_jax.weights.cost import Cost, cost
from rabit_jax.weights.describe import describe
from rabit_jax.weights.dual_binary import DualBinary
from rabit_jax.weights.frozen import FrozenPath
from rabit_jax.weights.group_uniform import GroupUniform
from rabit_jax.weights.independent import IndependentSign, independent_weight
from rabit_jax.weights.linear import Weight, is_weight, linear
from rabit_jax.weights.low_rank import LowRankSign
from rabit_jax.weights.packed import PackedSign
from rabit_jax.weights.reshaped import Reshaped
from rabit_jax.weights.residual import ResidualSign
from rabit_jax.weights.scaled import ScaledWeight
from rabit_jax.weights.ste import coupled_signs, effective_weight
from rabit_jax.weights.sum import SumWeight
from rabit_jax.weights.uniform import UniformResidual

__all__ = [
    "LLAMA_LINEARS",
    "Codebook",
    "Cost",
    "DualBinary",
    "FrozenPath",
    "GroupUniform",
    "IndependentSign",
    "LowRankSign",
    "PackedSign",
    "Reshaped",
    "ResidualSign",
    "ScaledWeight",
    "SumWeight",
    "UniformResidual",
    "Weight",
    "convert",
    "cost",
    "coupled_signs",
    "dense",
    "describe",
    "effective_weight",
    "independent_weight",
    "is_weight",
    "linear",
    "match_rules",
    "pack",
    "weights_of",
]
