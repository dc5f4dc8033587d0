"""The coupled forward of RaBiT and its straight-through backward (arXiv 2602.05367, section 3)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from rabit_jax.errors import BadInput, check_choice
from rabit_jax.types import Array

F32 = jnp.float32
TINY = float(jnp.finfo(F32).tiny)
SIGN_BIT = 0x80000000

# What the backward takes sign(V) for, see `path_slope`.
Ste = Literal["identity", "scaled", "clipped", "smooth"]
STE = get_args(Ste)
Slope = Callable[[Array, Array], Array]  # (v, a) -> d(a sign(v)) / dv, all float32 [..., i, o]
_own_rules: dict[str, Slope] = {}


def add_ste(name: str, slope: Slope) -> None:
    """Give a straight-through rule of your own a name, for `ste` of a spec or of a config.

    Args:
      name: of the rule.
      slope: `(v, a) -> d(a sign(v)) / dv` as the rule takes it, float32 arrays of one shape; see
        `path_slope`.

    Raises:
      BadInput: the name is taken.

    Example:
      >>> add_ste("triangle", lambda v, a: jnp.maximum(0.0, 1 - jnp.abs(v / a)))
      >>> spec = ResidualSignSpec(ste="triangle")
    """
    if name in ste_names():
        raise BadInput(f"the straight-through rule {name!r} exists: choose another name")
    _own_rules[name] = slope


def ste_names() -> tuple[str, ...]:
    """The names of all straight-through rules."""
    return (*STE, *_own_rules)


def outer(h: Float[Array, "*l i"], g: Float[Array, "*l o"]) -> Float[Array, "*l i o"]:
    """`h g^T` in float32: `[..., i]`, `[..., o]` -> `[..., i, o]`."""
    return h.astype(F32)[..., :, None] * g.astype(F32)[..., None, :]


def summed(terms: Iterable[Float[Array, "*n"]]) -> Float[Array, "*n"]:
    """The sum of at least one array, added in order."""
    return functools.reduce(operator.add, terms)


def with_sign(step: Float[Array, "*n"], positive: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """`+step` where `positive`, else `-step`, as an integer operation on the sign bit.

    The integer form keeps the compiler from contracting the product inside `step` with the
    subtraction that follows it: a fused multiply-add rounds once where the plain form rounds
    twice, so two compilations of one formula could disagree about the next path's signs.
    """
    bits = jax.lax.bitcast_convert_type(step, jnp.uint32)
    flipped = jnp.where(positive, bits, bits ^ jnp.uint32(SIGN_BIT))
    return jax.lax.bitcast_convert_type(flipped, F32)


def coupled(
    latent: Float[Array, "*l i o"], g: Float[Array, "*l k o"], h: Float[Array, "*l k i"]
) -> Iterator[tuple[Bool[Array, "*l i o"], Float[Array, "*l i o"]]]:
    """Walk the residual chain; the one place where signs are derived.

        R_0 = W;  B_i = sign(R_{i-1});  W_hat_i = h_i B_i g_i;  R_i = R_{i-1} - W_hat_i

    with sign(0) = +1, in float32 whatever the latent is stored in. The forward, the backward,
    `pack`, the initialisation and the sign-flip counter all read their signs here.

    Args:
      latent: `[..., i, o]` float32 or bfloat16.
      g: `[..., k, o]` output ("row") scales; 16-bit ones are multiplied in float32.
      h: `[..., k, i]` input ("column") scales.

    Yields:
      For each path `(positive, term)`: bool `[..., i, o]`, True where `B_i = +1`, and
      `W_hat_i` float32 `[..., i, o]`.
    """
    residual = latent.astype(F32)
    for i in range(g.shape[-2]):
        positive = residual >= 0
        term = with_sign(outer(h[..., i, :], g[..., i, :]), positive)
        yield positive, term
        residual = residual - term


def coupled_signs(
    latent: Float[Array, "*l i o"], g: Float[Array, "*l k o"], h: Float[Array, "*l k i"]
) -> Bool[Array, "*l k i o"]:
    """The signs of all paths, True for +1."""
    return jnp.stack([positive for positive, _ in coupled(latent, g, h)], axis=-3)


def path_slope(
    v: Float[Array, "*l i o"], a: Float[Array, "*l i o"], ste: str
) -> Float[Array, "*l i o"]:
    """`d(a sign(v)) / dv` as a straight-through rule takes it, float32, shape of `v`.

        identity   1                    as if a sign(v) were v (the published rule of RaBiT)
        scaled     a                    as if sign(v) were v
        clipped    1 where |v| <= |a|   as if a sign(v) were v cut at -a and a
        smooth     1 / cosh(v / a)^2    as if a sign(v) were a tanh(v / a)

    `v: [..., i, o]` is what the sign is taken of, `a: [..., i, o]` the path's scale `h g^T`. Where
    a is 0, the smooth slope is its limit: 1 at v = 0, otherwise 0.

    Raises BadInput for an unknown rule.
    """
    check_choice("ste", ste, ste_names())
    v = v.astype(F32)
    if ste in _own_rules:
        return _own_rules[ste](v, a).astype(F32)
    if ste == "scaled":
        return a
    if ste == "clipped":
        return (jnp.abs(v) <= jnp.abs(a)).astype(F32)
    if ste == "smooth":
        return 1 / jnp.square(jnp.cosh(v / jnp.where(jnp.abs(a) < TINY, TINY, a)))
    return jnp.ones_like(v)


def _coupled_slope(latent: Array, g: Array, h: Array, ste: str) -> Array:
    """`dW_hat / dW = 1 - prod_i (1 - s_i)` by the chain rule through the residuals.

    With `s_i` the slope of path i at `R_{i-1}`: `dW_hat_i = s_i dR_{i-1}`, `dR_i = (1 - s_i)
    dR_{i-1}`. Slopes of 1 give 1; clipped ones give 1 where `|W| <= a_1 + ... + a_k`.
    """
    left, residual = jnp.ones(latent.shape, F32), latent.astype(F32)
    for i, (_, term) in enumerate(coupled(latent, g, h)):
        left = left * (1 - path_slope(residual, outer(h[..., i, :], g[..., i, :]), ste))
        residual = residual - term
    return 1 - left


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def effective_weight(
    latent: Float[Array, "*l i o"],
    g: Float[Array, "*l k o"],
    h: Float[Array, "*l k i"],
    dtype: DTypeLike = F32,
    ste: str = "identity",
) -> Float[Array, "*l i o"]:
    """`W_hat = sum_i diag(h_i) B_i diag(g_i)` with the signs `B_i` of the coupled forward.

    Backward, with `G = dL/dW_hat` (the published one, `ste="identity"`):

        dL/dW = G;   dL/dg_i[o] = sum_in G B_i h_i;   dL/dh_i[in] = sum_out G B_i g_i

    Other rules change the first alone: `dL/dW = (1 - prod_i (1 - s_i)) G`, `s_i` by `path_slope`.

    The signs are constants of the backward and are derived again in it, so the residuals are the
    inputs and nothing else.

    Args:
      latent: `[..., i, o]` float32 or bfloat16.
      g: `[..., k, o]` float32.
      h: `[..., k, i]` float32.
      dtype: dtype of the result; sums are taken in float32 and rounded once.
      ste: straight-through rule, one of `STE`.

    Returns:
      `[..., i, o]` in `dtype`.

    Raises:
      BadInput: an unknown `ste`.

    Example:
      >>> w = jnp.array([[0.9, -0.2]])
      >>> effective_weight(w, g=jnp.array([[1.0, 1.0], [1.0, 1.0]]), h=jnp.array([[0.5], [0.25]]))
      Array([[ 0.75, -0.25]], dtype=float32)
    """
    check_choice("ste", ste, ste_names())
    return summed(term for _, term in coupled(latent, g, h)).astype(dtype)


def _forward(latent, g, h, dtype, ste):
    return effective_weight(latent, g, h, dtype, ste), (latent, g, h)


def _backward(dtype, ste, residuals, cotangent):
    latent, g, h = residuals
    cotangent = cotangent.astype(F32)
    signs = (positive for positive, _ in coupled(latent, g, h))
    through = cotangent if ste == "identity" else cotangent * _coupled_slope(latent, g, h, ste)
    return through.astype(latent.dtype), *scale_gradients(cotangent, signs, g, h)


def scale_gradients(
    cotangent: Float[Array, "*l i o"],
    signs: Iterable[Bool[Array, "*l i o"]],
    g: Float[Array, "*l k o"],
    h: Float[Array, "*l k i"],
) -> tuple[Float[Array, "*l k o"], Float[Array, "*l k i"]]:
    """`dg_i[o] = sum_in G B_i h_i`, `dh_i[in] = sum_out G B_i g_i`, one path after another.

    `cotangent` is `G` in float32; `signs` are those of each path, True for +1. Sums are taken in
    float32, and the results have the dtypes of `g` and `h`.
    """
    dg, dh = [], []
    for i, positive in enumerate(signs):
        signed = with_sign(cotangent, positive)
        dg.append(jnp.einsum("...io,...i->...o", signed, h[..., i, :].astype(F32)))
        dh.append(jnp.einsum("...io,...o->...i", signed, g[..., i, :].astype(F32)))
    return jnp.stack(dg, axis=-2).astype(g.dtype), jnp.stack(dh, axis=-2).astype(h.dtype)

effective_weight.defvjp(_forward, _backward)


def flips(
    before: Bool[Array, "*l k i o"], after: Bool[Array, "*l k i o"]
) -> Float[Array, "*l k"]:
    """Share of signs that differ, per path, float32."""
    return jnp.mean(before ^ after, axis=(-2, -1), dtype=F32)


def live_paths(g: Float[Array, "*l k o"], h: Float[Array, "*l k i"]) -> Bool[Array, "*l k"]:
    """Which paths there are: those behind the last with a scale that is not 0 are none.

    Such are the paths that a layer of a stack lacks (`weights.mixed_stack`). A matrix of zeros
    alone has all of its paths.
    """
    used = jnp.any(g != 0, axis=-1) & jnp.any(h != 0, axis=-1)
    later = jax.lax.cummax(used.astype(jnp.int8), axis=used.ndim - 1, reverse=True) > 0
    return later | ~jnp.any(used, axis=-1, keepdims=True)


def disordered(g: Float[Array, "*l k o"], h: Float[Array, "*l k i"]) -> Float[Array, "*l"]:
    """Share of elements whose scale products do not fall, `a_i <= a_{i+1}` or `a_i <= 0`.

    There the 2^k levels are no longer a nearest rounding of the latent. `g: [..., k, o]`,
    `h: [..., k, i]` -> `[...]` float32; 0 for a healthy k = 1, and for elements that all paths
    leave out, as those of a matrix of zeros.
    """
    a = outer(h, g)
    used = jnp.any(a != 0, axis=-3)
    falls = jnp.all((a > 0) | ~live_paths(g, h)[..., None, None], axis=-3)
    for i in range(g.shape[-2] - 1):
        falls &= a[..., i, :, :] > a[..., i + 1, :, :]
    return jnp.mean(~falls & used, axis=(-2, -1), dtype=F32)
