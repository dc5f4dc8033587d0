"""The straight-through rules of the coupled forward, against the chain rule in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.signs.ste import STE, effective_weight, path_slope


def gradient(node, ste, cotangent):
    def loss(latent):
        return jnp.sum(effective_weight(latent, node.g, node.h, jnp.float32, ste) * cotangent)

    return np.asarray(jax.jit(jax.grad(loss))(node.latent), np.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("ste", STE)
def test_the_latent_gets_the_chain_rule_through_the_residuals(k, ste, make_node, slope64):
    node = make_node(k, lead=(2,))
    cotangent = np.random.default_rng(1).normal(size=node.shape).astype(np.float32)
    w, g, h = (np.asarray(x, np.float64) for x in (node.latent, node.g, node.h))
    # dR_0 = 1;  dW_hat_i = s_i dR_{i-1};  dR_i = dR_{i-1} - dW_hat_i
    residual, d_residual, d_weight = w, np.ones_like(w), np.zeros_like(w)
    margin = np.full(w.shape, np.inf)
    for n in range(k):
        a = h[:, n, :, None] * g[:, n, None, :]
        step = slope64(ste, residual, a) * d_residual
        d_weight, d_residual = d_weight + step, d_residual - step
        edges = np.minimum(np.abs(residual), np.abs(np.abs(residual) - a))
        margin = np.minimum(margin, edges)
        residual = residual - np.where(residual >= 0, a, -a)
    clear = margin > 1e-5  # a rounding decides no sign and no clipping there
    assert clear.mean() > 0.99
    got = gradient(node, ste, cotangent)
    np.testing.assert_allclose(got[clear], (d_weight * cotangent)[clear], rtol=2e-5, atol=2e-6)


def test_clipping_stops_the_gradient_beyond_the_outermost_level(make_node):
    node = make_node(3, 40, 50)
    reach = np.einsum("ki,ko->io", np.asarray(node.h, np.float64), np.asarray(node.g, np.float64))
    got = gradient(node, "clipped", np.ones(node.shape, np.float32))
    beyond = np.abs(np.asarray(node.latent, np.float64)) > reach
    assert 0.05 < beyond.mean() < 0.95
    np.testing.assert_array_equal(got, np.where(beyond, 0.0, 1.0))


@pytest.mark.parametrize("ste", STE)
def test_forward_and_scale_gradients_are_the_same_for_every_rule(ste, make_node):
    node = make_node(2)

    def loss(g, h, ste):
        return jnp.sum(effective_weight(node.latent, g, h, jnp.float32, ste) ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    jax.tree.map(
        np.testing.assert_array_equal,
        run(node.g, node.h, ste),
        run(node.g, node.h, "identity"),
    )


@pytest.mark.parametrize("ste", STE)
def test_slopes_are_finite_far_out(ste):
    v = jnp.asarray([[-1e4, -1.0, 0.0, 1e4]])
    assert np.isfinite(np.asarray(path_slope(v, jnp.full((1, 4), 1e-3), ste))).all()
