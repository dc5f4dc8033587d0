"""Independent references in float64 NumPy that share no code with the package."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.iterative_svid import svid
from rabit_jax.weights.residual_sign import ResidualSign


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
