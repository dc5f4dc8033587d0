"""Weight representations and the pure functions that map params trees to params trees."""

from rabit_jax.weights.convert import LLAMA_LINEARS, convert, dense, match_rules, pack, weights_of
from rabit_jax.weights.describe import describe
from rabit_jax.weights.independent import IndependentSign, independent_weight
from rabit_jax.weights.linear import Weight, is_weight, linear
from rabit_jax.weights.packed import PackedSign
from rabit_jax.weights.residual import ResidualSign
from rabit_jax.weights.ste import coupled_signs, effective_weight

__all__ = [
    "LLAMA_LINEARS",
    "IndependentSign",
    "PackedSign",
    "ResidualSign",
    "Weight",
    "convert",
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
