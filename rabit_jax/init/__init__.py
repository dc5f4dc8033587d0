"""From a full-precision model to a 2-bit one: calibration, importance, iterative residual SVID."""

from rabit_jax.init.codebook import CodebookSpec
from rabit_jax.init.compose import ScaledSpec, Spec, SumSpec, residual, scaled
from rabit_jax.init.dual_binary import DualBinarySpec
from rabit_jax.init.foreign import calibrate_flax
from rabit_jax.init.frozen import FrozenPathSpec
from rabit_jax.init.group_uniform import GroupUniformSpec
from rabit_jax.init.importance import Stats, importance
from rabit_jax.init.independent import IndependentSignSpec
from rabit_jax.init.low_rank import LowRankSignSpec, rank_for_bits
from rabit_jax.init.outliers import record_limbs
from rabit_jax.init.probes import calibrate
from rabit_jax.init.residual import ResidualSignSpec
from rabit_jax.init.rounding import round_to_nearest
from rabit_jax.init.svid import greedy, relative_error, svid
from rabit_jax.init.uniform import UniformResidualSpec

__all__ = [
    "CodebookSpec",
    "DualBinarySpec",
    "FrozenPathSpec",
    "GroupUniformSpec",
    "IndependentSignSpec",
    "LowRankSignSpec",
    "ResidualSignSpec",
    "ScaledSpec",
    "Spec",
    "Stats",
    "SumSpec",
    "UniformResidualSpec",
    "calibrate",
    "calibrate_flax",
    "greedy",
    "importance",
    "rank_for_bits",
    "record_limbs",
    "relative_error",
    "residual",
    "round_to_nearest",
    "scaled",
    "svid",
]
