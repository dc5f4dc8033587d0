"""Oracles of this room: plain float64 NumPy loops that share no code with the package."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.weights import ResidualSign


def _coupled64(latent, g, h):
    """Residual chain element by element: signs, terms and `|R| / a`, each `[..., k, i, o]`."""
    w, g, h = (np.asarray(a).astype(np.float64) for a in (latent, g, h))
    *lead, i, o = w.shape
    k = g.shape[-2]
    signs, terms, margins = (np.zeros((*lead, k, i, o)) for _ in range(3))
    for at in np.ndindex(*w.shape):
        l, r, c = at[:-2], at[-2], at[-1]
        residual = w[at]
        for n in range(k):
            a = h[(*l, n, r)] * g[(*l, n, c)]
            b = 1.0 if residual >= 0 else -1.0
            signs[(*l, n, r, c)] = b
            terms[(*l, n, r, c)] = b * a
            margins[(*l, n, r, c)] = abs(residual) / abs(a)
            residual -= b * a
    return signs, terms, margins


@pytest.fixture
def coupled64():
    return _coupled64


def _slope64(ste, v, a):
    """The slope that each straight-through rule takes `a sign(v)` to have at `v`."""
    v = np.asarray(v).astype(np.float64)
    return {
        "identity": np.ones_like(v),
        "scaled": a + 0 * v,
        "clipped": np.where(np.abs(v) > np.abs(a), 0.0, 1.0),
        "smooth": 1 / np.cosh(v / a) ** 2,
    }[ste]


@pytest.fixture
def slope64():
    return _slope64


@pytest.fixture(scope="session")
def make_node():
    """`make(k, i, o, lead, dtype, seed)` -> a ResidualSign with a_1 > a_2 > ... > 0 at random."""

    def make(k, i=24, o=20, lead=(), dtype="float32", seed=0, decay=0.45):
        rng = np.random.default_rng(seed + 100 * k)
        w = rng.normal(size=(*lead, i, o))
        size = decay ** np.arange(k)[:, None] * 0.8
        g = size * np.exp(0.1 * rng.normal(size=(*lead, k, o)))
        h = np.exp(0.1 * rng.normal(size=(*lead, k, i)))
        return ResidualSign(
            jnp.asarray(w, dtype), jnp.asarray(g, jnp.float32), jnp.asarray(h, jnp.float32)
        )

    return make
