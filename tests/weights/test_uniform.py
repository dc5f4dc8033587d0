"""`UniformResidual` against rounding to even levels, and its fit against the known best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.channel_importance import Stats
from rabit_jax.weights.uniform_residual import UniformResidual, UniformResidualSpec


def make(k):
    rng = np.random.default_rng(k)
    w = rng.normal(size=(2, 30, 26))
    g, h = (np.exp(0.1 * rng.normal(size=(2, 1, n))) for n in (26, 30))
    return UniformResidual(*(jnp.asarray(a, jnp.float32) for a in (w, 0.7 * g, h)), k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_weight_is_rounded_to_evenly_spaced_levels(k):
    node = make(k)
    w, g, h = (np.asarray(x, np.float64) for x in (node.latent, node.g, node.h))
    step = h[:, 0, :, None] * g[:, 0, None, :] * 0.5 ** (k - 2)  # between two levels
    index = np.clip(np.floor(w / step), -(2 ** (k - 1)), 2 ** (k - 1) - 1)
    clear = np.abs(w / step - np.round(w / step)) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_allclose(np.asarray(node.dense())[clear], ((index + 0.5) * step)[clear],
                               atol=1e-6)


def test_gradients_are_those_of_the_levels():
    node = make(2)
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda n: jnp.sum(n.dense() * cotangent)))(node)
    np.testing.assert_array_equal(got.latent, cotangent)
    g, h = np.asarray(node.g, np.float64)[:, 0], np.asarray(node.h, np.float64)[:, 0]
    level = np.asarray(node.dense(), np.float64) / (h[..., :, None] * g[..., None, :])
    want_g = np.einsum("lio,lio,li->lo", cotangent, level, h)
    want_h = np.einsum("lio,lio,lo->li", cotangent, level, g)
    np.testing.assert_allclose(got.g[:, 0], want_g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.h[:, 0], want_h, rtol=1e-4, atol=1e-4)


def test_a_gaussian_is_fitted_by_the_best_uniform_quantiser():
    # Best uniform 4-level quantiser of a unit Gaussian (Max, 1960): step .9957, MSE .1188.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(512, 768)), jnp.float32)
    node = UniformResidualSpec(k=2).init(w)
    error = float(jnp.mean((w - node.dense()) ** 2) / jnp.mean(w**2))
    size = float(jnp.mean(node.g) * jnp.mean(node.h))
    assert error == pytest.approx(0.1188, abs=0.003) and size == pytest.approx(0.9957, abs=0.03)
    greedy = UniformResidualSpec(k=2, rounds=0).init(w)
    assert float(jnp.mean((w - greedy.dense()) ** 2)) > 1.05 * error


def test_importance_lowers_the_weighted_error():
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(64, 96)), jnp.float32)
    stats = Stats(*(jnp.asarray(np.exp(rng.normal(size=n)), jnp.float32) for n in (64, 96)))

    def error(node):
        scaled = (w - node.dense()) * stats.s_in[:, None] * stats.s_out[None, :]
        return float(jnp.sum(scaled**2))

    spec = UniformResidualSpec(k=2, a_in=1.0, a_out=1.0)
    assert error(spec.init(w, stats)) < 0.97 * error(spec.init(w))
