"""From a full-precision model to a 2-bit one: calibration, importance, iterative residual SVID."""

from rabit_jax.init.importance import Stats, importance
from rabit_jax.init.probes import calibrate
from rabit_jax.init.residual import ResidualSignSpec
from rabit_jax.init.svid import greedy, relative_error, svid

__all__ = ["ResidualSignSpec", "Stats", "calibrate", "greedy", "importance", "relative_error", "svid"]
