"""`UniformSign`, levels with one scale per group of inputs: against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, Stats, UniformResidualSpec, linear
from rabit_jax.train.sharding import make_mesh, param_shardings
from rabit_jax.tree import weights_of
from rabit_jax.weights.fixed import fixed
from rabit_jax.weights.laid import LaidCodes, lay
from rabit_jax.weights.uniform_sign import UniformSign

I, O, GROUP = 40, 24, 16  # the last group has 8 inputs


def kernel(lead=(2,), seed=0):
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=(*lead, 3, O))).repeat(GROUP, axis=-2)[..., :I, :]
    return jnp.asarray(size * rng.normal(size=(*lead, I, O)), jnp.float32)


def make(k, group=GROUP):
    return UniformResidualSpec(k=k, group=group).init(kernel())


def spread64(s):
    return np.asarray(s, np.float64).repeat(GROUP, axis=-2)[..., :I, :]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_weight_is_rounded_to_odd_multiples_of_one_step(k):
    node = make(k)
    w, unit = np.asarray(node.latent, np.float64), spread64(node.s) * 0.5 ** (k - 1)
    odd = np.clip(2 * np.floor(w / (2 * unit)) + 1, -(2**k - 1), 2**k - 1)
    clear = np.abs(w / unit / 2 - np.round(w / unit / 2)) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_allclose(np.asarray(node.dense())[clear], (odd * unit)[clear], rtol=1e-6)
    packed = node.pack("w")
    np.testing.assert_array_equal(np.asarray(packed.integers())[clear], odd[clear])
    exact = np.asarray(packed.integers(), np.float64) * spread64(packed.s) * 0.5 ** (k - 1)
    np.testing.assert_array_equal(np.asarray(packed.dense(), np.float64), exact)


def test_one_path_has_the_importance_weighted_mean_magnitude_as_its_scale():
    rng = np.random.default_rng(1)
    stats = Stats(*(jnp.asarray(rng.uniform(0.5, 2, (2, n)), jnp.float32) for n in (I, O)))
    node = UniformResidualSpec(k=1, group=GROUP, a_in=1.0).init(kernel(), stats)
    w, weight = np.abs(np.asarray(kernel(), np.float64)), np.asarray(stats.s_in, np.float64) ** 2
    for m in range(3):
        at = slice(GROUP * m, GROUP * (m + 1))
        own = weight[:, at, None]
        want = (own * w[:, at]).sum(1) / own.sum(1)
        np.testing.assert_allclose(node.s[:, m], want, rtol=1e-5)


def test_a_gaussian_is_fitted_by_the_best_uniform_quantiser():
    # Best uniform 4-level quantiser of a unit Gaussian (Max, 1960): step .9957, MSE .1188; the fit
    # to 256 values has .3% less.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 96)), jnp.float32)
    node = UniformResidualSpec(k=2, group=256, tolerance=1e-5).init(w)
    error = float(jnp.mean((w - node.dense()) ** 2) / jnp.mean(w**2))
    assert error == pytest.approx(0.1188, abs=0.003)
    assert float(jnp.mean(node.s)) == pytest.approx(0.9957, abs=0.03)


def test_gradients_are_those_of_the_levels():
    node = make(2)
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda n: jnp.sum(n.dense() * cotangent)))(node)
    np.testing.assert_array_equal(got.latent, cotangent)
    level = np.asarray(node.dense(), np.float64) / spread64(node.s) * cotangent
    padded = np.pad(level, ((0, 0), (0, 8), (0, 0))).reshape(2, 3, GROUP, O)
    np.testing.assert_allclose(got.s, padded.sum(2), rtol=1e-4, atol=1e-4)
    # Packed, the scales train alone and have the same gradient.
    frozen = fixed({"w": node.pack("w")})
    found = jax.grad(lambda p: jnp.sum(p["w"].dense() * cotangent), allow_int=True)(frozen)
    np.testing.assert_allclose(found["w"].packed_weight.s, got.s, rtol=1e-4, atol=1e-4)


def test_bits_are_counted_exactly():
    for k in (1, 2):
        node = make(k)
        assert node.bits_per_weight() == pytest.approx(k + 16 * 3 / I)
        assert node.bits_per_weight() == node.pack("w").bits_per_weight()
        assert node.deployed_bytes() == 2 * (8 * k * O + 2 * 3 * O)  # rows of 40 in blocks of 64
        assert node.cost().multiplications == 2 * 3 * O


@pytest.mark.parametrize("k", [1, 2, 4])
def test_laid_matrices_are_joined_and_multiply_as_the_packed_ones(k):
    nodes = [UniformResidualSpec(k=k, group=GROUP).init(kernel(seed=n)).pack("w") for n in (0, 1)]
    laid = lay(nodes, "cpu")
    assert isinstance(laid, LaidCodes) and lay([nodes[0], make(3).pack("w")], "cpu") is None
    x = np.random.default_rng(3).normal(size=(4, I)).astype(np.float32)
    want = np.concatenate([x.astype(np.float64) @ np.asarray(n.dense(), np.float64)[1]
                           for n in nodes], axis=-1)
    np.testing.assert_allclose(laid.matmul_at(x, 1), want, rtol=1e-4, atol=1e-4)


def test_latents_are_split_over_the_mesh():
    node = UniformResidualSpec(k=1, group=8).init(kernel()[:, :32])
    tree = {"layers": {"mlp": {"down": {"kernel": node}}}}
    placed = jax.device_put(tree, param_shardings(tree, make_mesh({"data": 2, "tensor": 4})))
    (split,) = weights_of(placed).values()
    assert split.latent.addressable_shards[0].data.shape == (2, 8, O)
    x = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = jax.tree.map(lambda a: a[1], split)
    want = x.astype(np.float64) @ np.asarray(node.dense()[1], np.float64)
    np.testing.assert_allclose(jax.jit(linear)(x, one), want, atol=1e-4)


def test_the_spec():
    assert isinstance(make(2), UniformSign)
    zeros = UniformResidualSpec(k=2, group=8).init(jnp.zeros((16, 3))).pack("w")
    np.testing.assert_array_equal(zeros.dense(), 0)
    with pytest.raises(BadInput, match="group is -1"):
        UniformResidualSpec(group=-1)
