"""Channel importance: from calibration statistics to the diagonal preconditioner of the SVID."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from rabit_jax.errors import BadInput
from rabit_jax.signs.ste import F32
from rabit_jax.tree import pytree_dataclass
from rabit_jax.types import Array

FLOOR = 1e-4
HIGHEST = 2.0  # exponent; with the floor the importances then span 1e8, which float32 holds


@pytree_dataclass
class Stats:
    """Second moments of one kernel over the calibration tokens.

    Attributes:
      s_in: float32 `[..., i]`, root mean square of each input channel.
      s_out: float32 `[..., o]`, root mean square over tokens of the loss gradient at each output.
    """

    s_in: Float[Array, "*l i"]
    s_out: Float[Array, "*l o"]


def importance(
    s: Float[Array, "*l n"], exponent: float, shrinkage: float = 0.0
) -> Float[Array, "*l n"]:
    """`d = (s' / geometric_mean(s'))^exponent`, `s' = (1 - shrinkage) s + shrinkage mean(s)`.

    Channels are floored at 1e-4 of the mean, so that a dead one divides by nothing; where all are
    dead, as in a block whose output is multiplied by 0, all are equally important. Scale-free: the
    loss may be summed or averaged. The result is float32.
    """
    s = s.astype(F32)
    s = jnp.where(jnp.max(s, axis=-1, keepdims=True) > 0, s, 1)
    mean = jnp.mean(s, axis=-1, keepdims=True)
    s = jnp.maximum((1 - shrinkage) * s + shrinkage * mean, FLOOR * mean)
    log = jnp.log(s)
    return jnp.exp(exponent * (log - jnp.mean(log, axis=-1, keepdims=True)))


def check_exponents(*exponents: float) -> None:
    """Raise BadInput for an exponent `a_in` or `a_out` outside 0..2, NaN included."""
    if not all(0 <= exponent <= HIGHEST for exponent in exponents):
        raise BadInput(f"a_in, a_out are {', '.join(map(str, exponents))}: an exponent of the "
                       f"importance must lie in 0..{HIGHEST:g}, 0 ignores the importance")
