"""`importance` against the formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import importance
from rabit_jax.weights.codebook import CodebookSpec
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.residual_sign import ResidualSignSpec
from rabit_jax.weights.scaled_weight import ScaledSpec


def formula(s, exponent, shrinkage):
    s = np.asarray(s, np.float64)
    mean = s.mean(-1, keepdims=True)
    s = np.maximum((1 - shrinkage) * s + shrinkage * mean, 1e-4 * mean)
    return (s / np.exp(np.log(s).mean(-1, keepdims=True))) ** exponent


@pytest.fixture
def s():
    return np.exp(np.random.default_rng(0).normal(size=(3, 50))).astype(np.float32)


@pytest.mark.parametrize("exponent, shrinkage", [(0.5, 0.0), (1.0, 0.2), (0.75, 0.6), (0.0, 0.0)])
def test_it_is_the_formula(exponent, shrinkage, s):
    got = importance(jnp.asarray(s), exponent, shrinkage)
    assert got.shape == s.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, formula(s, exponent, shrinkage), rtol=1e-5)


def test_its_geometric_mean_is_one_and_the_scale_of_the_loss_does_not_matter(s):
    d = np.asarray(importance(jnp.asarray(s), 0.5, 0.2), np.float64)
    np.testing.assert_allclose(np.log(d).mean(-1), 0, atol=1e-6)
    for factor in (1e-6, 1e6):
        np.testing.assert_allclose(importance(jnp.asarray(factor * s), 0.5, 0.2), d, rtol=1e-5)


def test_exponent_zero_and_full_shrinkage_ignore_the_statistics(s):
    np.testing.assert_array_equal(importance(jnp.asarray(s), 0.0), np.ones_like(s))
    np.testing.assert_allclose(importance(jnp.asarray(s), 1.0, 1.0), 1, rtol=1e-6)


def test_a_dead_channel_is_floored(s):
    s[0, 7] = 0
    d = np.asarray(importance(jnp.asarray(s), 1.0), np.float64)
    assert np.isfinite(d).all() and (d > 0).all()
    np.testing.assert_allclose(d[0, 7] / d[0, 8], 1e-4 * s[0].mean() / s[0, 8], rtol=1e-4)
    np.testing.assert_allclose(d, formula(s, 1.0, 0.0), rtol=1e-4)


def test_a_layer_without_any_signal_counts_all_channels_alike(s):
    s[1] = 0
    d = np.asarray(importance(jnp.asarray(s), 1.0), np.float64)
    np.testing.assert_array_equal(d[1], 1)
    np.testing.assert_allclose(d[[0, 2]], formula(s[[0, 2]], 1.0, 0.0), rtol=1e-4)


@pytest.mark.parametrize("spec", [CodebookSpec, DualBinarySpec, ResidualSignSpec, ScaledSpec])
@pytest.mark.parametrize("exponent", [-0.5, 2.5, float("nan"), float("inf")])
def test_exponents_out_of_range_are_refused(spec, exponent):
    with pytest.raises(BadInput, match=r"an exponent of the importance must lie in 0\.\.2"):
        spec(a_in=exponent)
