"""Oracles of this room, in float64 NumPy, and one compiled `svid` for all tests."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.init import svid


@pytest.fixture(scope="session")
def fit():
    """`fit(w, k, d_in, d_out, rounds, tolerance)` -> Svid in NumPy."""

    @partial(jax.jit, static_argnums=1)
    def run(w, k, d_in, d_out, rounds, tolerance):
        return svid(w, k, d_in, d_out, rounds=rounds, tolerance=tolerance)

    def call(w, k, d_in=None, d_out=None, rounds=80, tolerance=0.0):
        i, o = w.shape
        d_in = np.ones(i) if d_in is None else d_in
        d_out = np.ones(o) if d_out is None else d_out
        arrays = (jnp.asarray(a, jnp.float32) for a in (w, d_in, d_out))
        w, d_in, d_out = arrays
        return jax.tree.map(np.asarray, run(w, k, d_in, d_out, jnp.int32(rounds), float(tolerance)))

    return call


@pytest.fixture(scope="session")
def coupled64():
    """`coupled64(w, g, h)` of one matrix -> signs, terms, `|R| / a`, each `[k, i, o]`."""

    def walk(w, g, h):
        residual, g, h = (np.asarray(a).astype(np.float64) for a in (w, g, h))
        found = []
        for g_i, h_i in zip(g, h, strict=True):
            a = np.outer(h_i, g_i)
            sign = np.where(residual >= 0, 1.0, -1.0)
            found.append((sign, sign * a, np.abs(residual) / a))
            residual = residual - sign * a
        return tuple(np.stack(x) for x in zip(*found, strict=True))

    return walk


def _rank1(m):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return np.abs(u[:, 0]) * np.sqrt(s[0]), np.abs(v[0]) * np.sqrt(s[0])


@pytest.fixture(scope="session")
def svid64():
    """The published iteration with full SVDs: `svid64(w, k, rounds)`.

    After t rounds: `pairs[t][i]` is `(h, g)`, `signs[t][i]` its signs, `errors[t]` relative.
    """

    def run(w, k, rounds):
        w = np.asarray(w, np.float64)
        sign = lambda x: np.where(x >= 0, 1.0, -1.0)  # noqa: E731
        pairs, signs = [None] * k, [None] * k
        term = lambda i: 0 if pairs[i] is None else signs[i] * np.outer(*pairs[i])  # noqa: E731
        found = SimpleNamespace(pairs=[], signs=[], errors=[])
        for _ in range(rounds + 1):  # the first turn is the greedy one: later paths are still 0
            for i in range(k):
                rest = w - sum(term(j) for j in range(k) if j != i)
                signs[i], pairs[i] = sign(rest), _rank1(np.abs(rest))
            found.pairs.append(list(pairs))
            found.signs.append(list(signs))
            error = w - sum(term(i) for i in range(k))
            found.errors.append(np.sum(error**2) / np.sum(w**2))
        return found

    return run


@pytest.fixture(scope="session")
def two_layers64():
    """`(inputs, output gradients)` of both layers of `sum (tanh(x w + b) v + c - y)^2`."""

    def run(x, w, b, v, c, y):
        x, w, b, v, c, y = (np.asarray(a, np.float64) for a in (x, w, b, v, c, y))
        hidden = np.tanh(x @ w + b)
        d_out = 2 * (hidden @ v + c - y)
        return (x, (d_out @ v.T) * (1 - hidden**2)), (hidden, d_out)

    return run


def _rms(a, mask):
    rows = a.reshape(-1, a.shape[-1])
    keep = np.ones(len(rows), bool) if mask is None else np.asarray(mask).reshape(-1)
    total = np.zeros(a.shape[-1])
    for row in rows[keep]:
        total += row**2
    return np.sqrt(total / keep.sum())


@pytest.fixture(scope="session")
def same_stats():
    """`same_stats(stats, {path: (inputs, output gradients)}, mask)`: to 1e-5, position by position.

    Inputs and gradients are `[..., channels]` of one layer; the mask has their leading axes.
    """

    def check(stats, by_hand, mask=None):
        assert set(stats) == set(by_hand)
        for path, (x, dy) in by_hand.items():
            for got, a in ((stats[path].s_in, x), (stats[path].s_out, dy)):
                want = _rms(a, mask)
                assert got.shape == want.shape and got.dtype == jnp.float32
                atol = 1e-5 * want.max()
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol, err_msg=path)

    return check
