"""From a full-precision model to a 2-bit one: calibration, importance, iterative residual SVID."""

from rabit_jax.init.importance import Stats, importance
from rabit_jax.init.independent import IndependentSignSpec
from rabit_jax.init.probes import calibrate
from rabit_jax.init.residual import ResidualSignSpec
from rabit_jax.init.rounding import round_to_nearest
from rabit_jax.init.svid import greedy, relative_error, svid

__all__ = [
    "IndependentSignSpec",
    "ResidualSignSpec",
    "Stats",
    "calibrate",
    "greedy",
    "importance",
    "relative_error",
    "round_to_nearest",
    "svid",
]
