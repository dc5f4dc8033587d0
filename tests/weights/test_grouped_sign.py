"""Sign paths with scales per group of inputs: against float64 NumPy, and against groups alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput, ResidualSignSpec, Stats, linear
from rabit_jax.kernels import tiles
from rabit_jax.kernels.grouped_signs import grouped_signs_matmul
from rabit_jax.kernels.layout import pack_bits
from rabit_jax.train.sharding import make_mesh, param_shardings
from rabit_jax.tree import weights_of
from rabit_jax.weights.grouped_sign import GroupedSign
from rabit_jax.weights.laid import LaidGroupedSign, lay

SPEC = ResidualSignSpec(k=2, rounds=3, group=16)
I, O = 40, 24  # the last group has 8 inputs


def kernel(lead=(2,)):
    rng = np.random.default_rng(0)
    # Groups of different sizes, which scales per row and column cannot follow.
    size = np.exp(rng.normal(size=(*lead, 3, O))).repeat(16, axis=-2)[..., :I, :]
    return jnp.asarray(size * rng.normal(size=(*lead, I, O)), jnp.float32)


def stats(lead=(2,)):
    rng = np.random.default_rng(1)
    return Stats(*(jnp.asarray(rng.uniform(0.5, 2, (*lead, n)), jnp.float32) for n in (I, O)))


@pytest.fixture(scope="module")
def node():
    return SPEC.init(kernel(), stats())


def dense64(packed):
    """`W_hat` of one packed layer from its arrays."""
    bits = np.asarray(packed.bits)
    octets = bits.reshape(*bits.shape[:-1], -1, 1, 32) >> np.arange(8)[:, None] & 1
    signs = 2.0 * octets.reshape(*bits.shape[:-1], -1)[..., :I] - 1
    g, h = (np.asarray(a, np.float64) for a in (packed.g, packed.h))
    return np.einsum("koi,kio,ki->io", signs, g.repeat(packed.group, axis=1)[:, :I], h)


def test_the_packed_weight_is_that_of_float64(node):
    packed = node.pack("w")
    for layer in range(2):
        one = jax.tree.map(lambda a, n=layer: a[n], packed)
        want = dense64(one)
        np.testing.assert_allclose(one.dense(), want, atol=1e-6)
        np.testing.assert_allclose(node.dense()[layer], want, atol=2e-3 * np.abs(want).max())
    np.testing.assert_array_equal(packed.signs(), node.signs())
    assert packed.g.shape == (2, 2, 3, O) and packed.h.shape == (2, 2, I)


def test_every_group_is_fitted_as_a_matrix_of_its_own(node):
    w, s, alone = kernel(), stats(), ResidualSignSpec(k=2, rounds=3)
    for group in range(2):
        at = slice(16 * group, 16 * (group + 1))
        own = alone.init(w[:, at], Stats(s.s_in[:, at], s.s_out))
        np.testing.assert_allclose(node.dense()[:, at], own.dense(), rtol=1e-5, atol=1e-6)
    # The filled group: zeros change nothing but the share at which the rounds end.
    own = alone.init(w[:, 32:], Stats(s.s_in[:, 32:], s.s_out))
    np.testing.assert_allclose(node.dense()[:, 32:], own.dense(), rtol=0.05, atol=0.02)


def test_groups_of_different_sizes_are_fitted_better():
    w = kernel()
    rows = ResidualSignSpec(k=2, rounds=3).init(w)

    def error(node):
        return float(jnp.sum(jnp.square(node.dense() - w)) / jnp.sum(jnp.square(w)))

    assert error(SPEC.init(w)) < 0.6 * error(rows)


def test_bits_are_counted_exactly(node):
    k, n = 2, 3
    assert node.bits_per_weight() == pytest.approx(k * (1 + 16 * n / I + 16 / O))
    assert node.bits_per_weight() == node.pack("w").bits_per_weight()
    # Rows of 40 inputs end in a block of 64.
    assert node.deployed_bytes() == 2 * k * (8 * O + 2 * n * O + 2 * I)
    assert node.cost().multiplications == 2 * k * (I + n * O)


def test_latent_and_scales_train_as_those_of_the_groups(node):
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(2, I, O)), jnp.float32)
    found = jax.grad(lambda n: jnp.sum(weight * n.dense()))(node)
    np.testing.assert_array_equal(found.blocks.latent.reshape(2, 48, O)[:, :I], weight)
    signs = np.asarray(node.blocks.signs(), np.float64)
    h = np.asarray(node.blocks.h, np.float64)
    own = np.pad(np.asarray(weight), ((0, 0), (0, 8), (0, 0))).reshape(2, 3, 16, O)
    want = np.einsum("lmio,lmkio,lmki->lmko", own, signs, h)
    np.testing.assert_allclose(found.blocks.g, want, atol=1e-4)


@pytest.mark.parametrize(("k", "i", "o", "group"), [(2, 40, 24, 16), (1, 300, 7, 64),
                                                    (4, 65, 9, 128)])
def test_the_product_is_that_of_float64(k, i, o, group, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 8 * i)  # the last tile overlaps the one before it
    rng = np.random.default_rng(k)
    signs = np.where(rng.random((2, k, o, i)) < 0.5, 1.0, -1.0)
    g = rng.uniform(0.5, 2, (2, k, -(-i // group), o)).astype(np.float16)
    h = rng.uniform(0.5, 2, (2, k, i)).astype(np.float16)
    wide = g.astype(np.float64).repeat(group, axis=2)[:, :, :i]
    dense = np.einsum("lkoi,lkio,lki->lio", signs, wide, h.astype(np.float64))
    x = rng.normal(size=(3, i)).astype(np.float32)
    bits = pack_bits(jnp.asarray(signs > 0))
    run = jax.jit(lambda n: grouped_signs_matmul(x, bits, g, h, group=group, layer=n))
    for layer in range(2):
        want = x.astype(np.float64) @ dense[layer]
        assert np.linalg.norm(run(layer) - want) < 1e-6 * np.linalg.norm(want)
    with pytest.raises(BadInput, match="does not fit x"):
        grouped_signs_matmul(x, bits, g[:, :, :, 1:], h, group=group)


def test_one_layer_of_a_stack_is_multiplied_where_it_lies(node):
    packed = node.pack("w")
    laid = lay([packed], "cpu")
    assert isinstance(laid, LaidGroupedSign)
    x = np.random.default_rng(3).normal(size=(4, I)).astype(np.float32)
    one = jax.tree.map(lambda a: a[1], packed)
    np.testing.assert_allclose(laid.matmul_at(x, 1), x @ dense64(one), atol=1e-4)
    np.testing.assert_allclose(linear(jnp.asarray(x), one), x @ dense64(one), atol=1e-4)


@pytest.mark.parametrize(("path", "group", "shard"), [
    ("layers/mlp/down/kernel", 8, (2, 1, 8, 24)),  # 4 groups over 4 devices
    ("layers/mlp/down/kernel", 16, (2, 2, 4, 24)),  # 2 groups: a quarter of each
    ("layers/mlp/up/kernel", 16, (2, 2, 16, 6)),
])
def test_latents_are_split_over_the_mesh(path, group, shard):
    tree = {}
    inner = tree
    for part in path.split("/")[:-1]:
        inner[part] = inner = {}
    inner["kernel"] = ResidualSignSpec(k=1, rounds=0, group=group).init(kernel()[:, :32])
    placed = jax.device_put(tree, param_shardings(tree, make_mesh({"data": 2, "tensor": 4})))
    (node,) = weights_of(placed).values()
    assert node.blocks.latent.addressable_shards[0].data.shape == shard
    x = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = jax.tree.map(lambda a: a[1], node)
    want = x.astype(np.float64) @ np.asarray(inner["kernel"].dense()[1], np.float64)
    np.testing.assert_allclose(jax.jit(linear)(x, one), want, atol=1e-4)


def test_the_spec():
    assert isinstance(SPEC.init(kernel(())), GroupedSign)
    with pytest.raises(BadInput, match="group is -1"):
        ResidualSignSpec(group=-1)
