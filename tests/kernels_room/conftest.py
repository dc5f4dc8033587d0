"""Random packed products and their float64 answer, sign by sign."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.layout import pack_bits


def _problem(batch, i, rows, k=2, layers=1, outlier=0.0, seed=0, dtype="float32", spread=1.0):
    """Activations, packed weights of m = len(rows) joined matrices, and `y` of every layer.

    Returns a namespace of x `[b, i]`, bits `[l, k, o, bytes]`, g `[l, k, o]`, h `[l, k, m, i]`,
    rows, and want, float64 `[l, b, o]`. An `outlier` is set in every row of x, so many times
    larger than the rest; scales spread over a factor `spread`.
    """
    rng = np.random.default_rng(seed)
    o, m = sum(rows), len(rows)
    signs = rng.choice([-1.0, 1.0], (layers, k, o, i))
    g = np.float16(rng.uniform(0.5, 1.5, (layers, k, o)) * spread ** rng.uniform(-1, 1, o))
    h = np.float16(rng.uniform(0.5, 1.5, (layers, k, m, i)))
    x = rng.normal(size=(batch, i))
    if outlier:
        x[np.arange(batch), rng.integers(i, size=batch)] = outlier
    x = jnp.asarray(x, dtype)
    member = np.repeat(np.arange(m), rows)
    scaled = np.asarray(x, np.float64)[None, :, None, None] * h.astype(np.float64)[:, None]
    want = np.einsum("lkoi,lbkoi,lko->lbo", signs, scaled[:, :, :, member], g.astype(np.float64),
                     optimize=True)
    return SimpleNamespace(x=x, bits=pack_bits(jnp.asarray(signs > 0)), g=jnp.asarray(g),
                           h=jnp.asarray(h), rows=tuple(rows), want=want)


@pytest.fixture(scope="session")
def problem():
    """`problem(batch, i, rows, k, layers, outlier, seed, dtype, spread)`."""
    return _problem


def _relative(found, want):
    found, want = np.asarray(found, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.fixture(scope="session")
def relative():
    """`relative(found, want)`: norm of the difference over the norm of `want`."""
    return _relative
