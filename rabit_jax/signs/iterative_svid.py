"""Iterative residual SVID: scales for k sign paths of one matrix (arXiv 2602.05367, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from rabit_jax.signs.ste import F32, TINY, coupled, outer, with_sign
from rabit_jax.types import Array

FLOOR = 1e-2
POWER_STEPS = 50


class Svid(NamedTuple):
    """Scales of one matrix: `g: [k, o]`, `h: [k, i]`, float32.

    `error` is `|W - W_hat|^2 / |W|^2` of the weight that these scales define, `rounds` how many
    refinement rounds were run.
    """

    g: Float[Array, "k o"]
    h: Float[Array, "k i"]
    error: Float[Array, ""]
    rounds: Int[Array, ""]


def rank1(
    m: Float[Array, "i o"], h: Float[Array, " i"], tolerance: float
) -> tuple[Float[Array, " o"], Float[Array, " i"]]:
    """Best rank-1 approximation `m ~ h g^T` by alternating least squares from a warm start.

        g <- m^T h / |h|^2;   h <- m g / |g|^2

    which is power iteration on `m m^T`. Stops when `h` moves by less than `tolerance` relative to
    itself. The factors are given equal root mean squares, and what is negative in them becomes 0.
    A matrix of zeros has factors of zeros.

    Args:
      m: `[i, o]` float32, non-negative on average.
      h: `[i]` float32 starting point.
      tolerance: relative change of `h` at which to stop.

    Returns:
      `(g, h)`, not negative.
    """

    def step(state):
        h, _, count = state
        new = _fit(m, _fit(m.T, h))
        change = jnp.linalg.norm(new - h) / jnp.maximum(jnp.linalg.norm(new), TINY)
        return new, change, count + 1

    def moving(state):
        return (state[1] > tolerance) & (state[2] < POWER_STEPS)

    h, _, _ = jax.lax.while_loop(moving, step, (h, jnp.inf, 0))
    g = _fit(m.T, h)
    size_g, size_h = (jnp.sqrt(jnp.mean(jnp.square(s))) + TINY for s in (g, h))
    ratio = jnp.sqrt(size_h / size_g)
    return jnp.maximum(g * ratio, 0), jnp.maximum(h / ratio, 0)


def root_of_unit(w: Array) -> Float[Array, ""]:
    """A power of two r with `r^2 <= max|w| < 4 r^2`, float32; 1 for zeros.

    Fits are made of `w / r^2`, whose squares stay in the range of float32 however large or small a
    matrix is. Neither that division nor giving the scales r back rounds anything.
    """
    largest = jnp.max(jnp.abs(w.astype(F32)), initial=0)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.uint32) >> 23  # 2^(exponent - 127)
    odd = exponent - (1 - exponent % 2)  # an even power of two
    root = jax.lax.bitcast_convert_type((odd + 127) // 2 << 23, F32)
    return jnp.where(exponent > 0, root, 1)


def _fit(m: Array, v: Array) -> Array:
    """Least squares `argmin_u |m - u v^T|`; 0 where `v` is."""
    return m @ v / jnp.maximum(jnp.vdot(v, v), TINY)


def floored(scale: Float[Array, "*k n"]) -> Float[Array, "*k n"]:
    """Scales raised to at least 1% of their mean along the last axis: `[..., n]`.

    So a dead channel keeps a positive scale that 16 bits can hold, as training and `pack` need it.
    To be applied where scales are stored: in a preconditioned space, whose channels may differ by
    orders of magnitude, the same floor would raise those that matter least far above their size.
    Scales that are all 0, of a path with nothing to fit, stay 0.
    """
    return jnp.maximum(scale, FLOOR * jnp.mean(jnp.abs(scale), axis=-1, keepdims=True))


def _residual(w: Array, g: Array, h: Array) -> Array:
    for _, term in coupled(w, g, h):
        w = w - term
    return w


def relative_error(
    w: Float[Array, "i o"], g: Float[Array, "k o"], h: Float[Array, "k i"]
) -> Float[Array, ""]:
    """`|W - W_hat|^2 / |W|^2` with the signs of the coupled forward, in float32."""
    w = w.astype(F32)
    return jnp.sum(jnp.square(_residual(w, g, h))) / jnp.maximum(jnp.sum(jnp.square(w)), TINY)


def _aligned(w: Array, g: Array, h: Array, i: int) -> Array:
    """`E_i * B_i` with `E_i = W - sum_{j != i} W_hat_j`: equal to `R_k B_i + h_i g_i^T`."""
    signs = [positive for positive, _ in coupled(w, g, h)]
    return with_sign(_residual(w, g, h), signs[i]) + outer(h[i], g[i])


def greedy(
    w: Float[Array, "i o"], k: int, tolerance: float
) -> tuple[Float[Array, "k o"], Float[Array, "k i"]]:
    """Greedy SVID: each path takes the rank-1 fit of the absolute residual of those before it."""
    g, h = [], []
    residual = w
    for _ in range(k):
        magnitude = jnp.abs(residual)
        pair = rank1(magnitude, jnp.mean(magnitude, axis=1), tolerance)
        g.append(pair[0])
        h.append(pair[1])
        residual = residual - with_sign(outer(pair[1], pair[0]), residual >= 0)
    return jnp.stack(g), jnp.stack(h)


def refine(
    w: Float[Array, "i o"], g: Float[Array, "k o"], h: Float[Array, "k i"], tolerance: float
) -> tuple[Float[Array, "k o"], Float[Array, "k i"]]:
    """One round: for every path in turn, derive ALL signs from `w`, then refit that path's pair.

    The refit is the rank-1 approximation of `E_i * B_i` with the signs held. Since the signs are
    always those of the coupled forward, what is fitted is what the trained weight computes. For
    k <= 2 and ordered scales this is the published Gauss-Seidel round; for k >= 3 it is not, and
    ends lower.
    """
    for i in range(g.shape[0]):
        pair = rank1(_aligned(w, g, h, i), h[i], tolerance)
        g, h = g.at[i].set(pair[0]), h.at[i].set(pair[1])
    return g, h


def svid(
    w: Float[Array, "i o"],
    k: int,
    d_in: Float[Array, " i"] | None = None,
    d_out: Float[Array, " o"] | None = None,
    rounds: int = 80,
    tolerance: float = 1e-3,
    power_tolerance: float = 1e-4,
) -> Svid:
    """Fit `W_hat = sum_i diag(h_i) B_i diag(g_i)` in the metric of `diag(d_in) W diag(d_out)`.

    Greedy SVID of the preconditioned matrix, then rounds of `refine` until one lowers the squared
    error by less than the share `tolerance`, at most `rounds`; the best round is kept and its
    scales are mapped back, `h_i / d_in` and `g_i / d_out`, and only then `floored`. Signs commute
    with a positive diagonal, so the signs of the result are the coupled signs of `w` itself.

    Args:
      w: `[i, o]` float.
      k: number of paths.
      d_in: `[i]` positive, importance of the inputs; None for 1.
      d_out: `[o]` positive, importance of the outputs; None for 1.
      rounds: most rounds; 0 is greedy SVID.
      tolerance: share of the error below which a round's gain ends the search; 0 runs all rounds.
      power_tolerance: relative change at which the power iteration stops.

    Returns:
      `Svid(g, h, error, rounds)`; `error` in the plain metric, signs derived from the final scales.
    """
    root = root_of_unit(w)
    w = w.astype(F32) / root / root
    d_in = jnp.ones(w.shape[0], F32) if d_in is None else d_in
    d_out = jnp.ones(w.shape[1], F32) if d_out is None else d_out
    p = w * outer(d_in, d_out)

    def round_(state):
        count, g, h, before, _, best = state
        g, h = refine(p, g, h, power_tolerance)
        error = relative_error(p, g, h)
        better = error < best[0]
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (error, g, h), best)
        return count + 1, g, h, error, before - error, best

    def gaining(state):
        count, _, _, error, gain, _ = state
        return (count < rounds) & ((gain > tolerance * error) | (tolerance == 0))

    g, h = greedy(p, k, power_tolerance)
    error = relative_error(p, g, h)
    start = (jnp.int32(0), g, h, error, jnp.asarray(jnp.inf, F32), (error, g, h))
    count, *_, (_, g, h) = jax.lax.while_loop(gaining, round_, start)
    g, h = floored(g / d_out[None]), floored(h / d_in[None])
    return Svid(g * root, h * root, relative_error(w, g, h), count)
