"""The mathematics of sign paths, arrays in and arrays out: the coupled walk, SVID, importance."""

from rabit_jax.signs.channel_importance import Stats, importance
from rabit_jax.signs.iterative_svid import greedy, relative_error, svid
from rabit_jax.signs.ste import add_ste, coupled_signs, effective_weight

__all__ = [
    "Stats",
    "add_ste",
    "coupled_signs",
    "effective_weight",
    "greedy",
    "importance",
    "relative_error",
    "svid",
]
