"""`ResidualSignSpec.init`: from a kernel to a node, stacked, in bfloat16 and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rabit_jax import BadInput, ResidualSignSpec, Stats
from rabit_jax.signs.channel_importance import importance

L, I, O = 2, 64, 96
TIE = 1e-5


@pytest.fixture(scope="module")
def kernel():
    return np.random.default_rng(2).normal(size=(L, I, O)).astype(np.float32) * 0.05


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(3)
    return Stats(*(jnp.asarray(np.exp(rng.normal(size=(L, n))), jnp.float32) for n in (I, O)))


@pytest.fixture(scope="module")
def nodes(kernel, stats):
    w = jnp.asarray(kernel)
    return {k: ResidualSignSpec(k=k, rounds=6).init(w, stats) for k in (1, 2, 3, 4)}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_start_is_a_fixed_point_of_the_coupled_forward(k, nodes, kernel, stats, coupled64):
    node = nodes[k]
    assert node.shape == (L, I, O) and node.g.dtype == node.h.dtype == jnp.float32
    np.testing.assert_array_equal(node.latent, kernel)
    positive = np.asarray(node.positive())
    ties = total = 0
    for n in range(L):
        g, h = (np.asarray(a[n], np.float64) for a in (node.g, node.h))
        d_in, d_out = (
            np.asarray(importance(s[n], 0.5), np.float64) for s in (stats.s_in, stats.s_out)
        )
        # The signs that the fit held (preconditioned, before the scales were mapped back) are those
        # that the node derives from its latent.
        fitted = d_in[:, None] * kernel[n] * d_out
        for w, g_, h_ in [(kernel[n], g, h), (fitted, g * d_out, h * d_in)]:
            signs, _, margins = coupled64(w, g_, h_)
            near = np.minimum.accumulate(margins, axis=0) < TIE
            np.testing.assert_array_equal(positive[n][~near], signs[~near] > 0)
            ties, total = ties + near.sum(), total + near.size
    assert ties / total < 1e-4


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_weight_is_close_and_the_reported_error_is_its_own(k, nodes, kernel, stats, fit):
    node = nodes[k]
    bound = {1: 0.45, 2: 0.16, 3: 0.06, 4: 0.025}[k]
    dense = np.asarray(node.dense(), np.float64)
    for n in range(L):
        error = np.sum((kernel[n] - dense[n]) ** 2) / np.sum(kernel[n].astype(np.float64) ** 2)
        assert error < bound
        if k == 2:
            d_in, d_out = (importance(s[n], 0.5) for s in (stats.s_in, stats.s_out))
            single = fit(kernel[n], k, d_in, d_out, rounds=6, tolerance=1e-3)
            assert single.error == pytest.approx(error, rel=1e-4)
            np.testing.assert_allclose(node.g[n], single.g, rtol=1e-3)
            np.testing.assert_allclose(node.h[n], single.h, rtol=1e-3)


def test_more_leading_axes_are_more_layers(nodes, kernel, stats):
    lead = jax.tree.map(lambda a: a[None], stats)
    node = ResidualSignSpec(k=1, rounds=6).init(jnp.asarray(kernel)[None], lead)
    assert node.shape == (1, L, I, O)
    np.testing.assert_allclose(node.g[0], nodes[1].g, rtol=1e-4)
    np.testing.assert_allclose(node.h[0], nodes[1].h, rtol=1e-4)


def test_scales_are_fitted_to_the_latent_that_is_stored(kernel, stats):
    spec = ResidualSignSpec(k=1, rounds=0, latent_dtype="bfloat16")
    node = spec.init(jnp.asarray(kernel), stats)
    assert node.latent.dtype == jnp.bfloat16 and node.g.dtype == node.h.dtype == jnp.float32
    rounded = ResidualSignSpec(k=1, rounds=0).init(jnp.asarray(kernel).astype(jnp.bfloat16), stats)
    np.testing.assert_allclose(node.g, rounded.g, rtol=1e-5)
    assert rounded.latent.dtype == jnp.float32


def test_the_latent_is_a_copy(kernel):
    w = jnp.asarray(kernel[0])
    node = ResidualSignSpec(k=1, rounds=0).init(w)
    w.delete()
    np.testing.assert_array_equal(node.latent, kernel[0])


def test_exponents_and_shrinkage_choose_the_metric(kernel, stats, nodes):
    def scales(**settings):
        spec = ResidualSignSpec(k=1, rounds=6, **settings)
        return np.asarray(spec.init(jnp.asarray(kernel), stats).h)

    plain = np.asarray(ResidualSignSpec(k=1, rounds=6).init(jnp.asarray(kernel)).h)
    np.testing.assert_allclose(scales(a_in=0.0, a_out=0.0), plain, rtol=1e-3)
    np.testing.assert_allclose(scales(shrinkage=1.0), plain, rtol=1e-3)
    assert np.abs(np.asarray(nodes[1].h) / plain - 1).max() > 0.05


def test_a_mesh_changes_nothing(kernel, stats, nodes):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    w = place(jnp.asarray(kernel), None, "data", "tensor")
    spread = Stats(place(stats.s_in, None, "data"), place(stats.s_out, None, "tensor"))
    node = ResidualSignSpec(k=2, rounds=6).init(w, spread)
    assert node.latent.sharding.is_equivalent_to(w.sharding, 3)
    one = nodes[2]
    np.testing.assert_allclose(node.g, one.g, rtol=1e-4)
    np.testing.assert_allclose(node.h, one.h, rtol=1e-4)
    assert (np.asarray(node.positive()) != np.asarray(one.positive())).mean() < 1e-4


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"k": 0}, "k is 0"), ({"k": 5}, "k is 5.*1, 2, 3 or 4"), ({"rounds": -1}, "rounds"),
        ({"tolerance": -0.1}, "tolerance"), ({"shrinkage": 1.1}, "shrinkage"),
        ({"latent_dtype": "float16"}, "latent_dtype.*float32 or bfloat16"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(BadInput, match=match):
        ResidualSignSpec(**settings)
