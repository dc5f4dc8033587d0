"""`DualBinary` and its packed form against float64 NumPy loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.weights.dual_binary import DualBinary, PackedDualBinary, dual_binary
from rabit_jax.weights.group_levels import unpack_codes

GROUP = 16
dense_of = jax.jit(lambda node: node.dense())
product = jax.jit(lambda node, x: node.matmul(x))


def make(i=40, o=12, lead=(2,), dtype="float32"):
    rng = np.random.default_rng(0)
    n = -(-i // GROUP)
    w = rng.normal(size=(*lead, i, o))
    a = np.stack([rng.uniform(0.8, 1.6, (*lead, n, o)), rng.normal(-0.5, 0.3, (*lead, n, o))], -3)
    return DualBinary(jnp.asarray(w, dtype), jnp.asarray(a, jnp.float32), GROUP)


def loops64(node):
    """Planes `[..., 2, i, o]` and `W_hat` in float64, element by element, with H(0) = 1."""
    w, a = (np.asarray(leaf).astype(np.float64) for leaf in (node.latent, node.a))
    planes, dense = np.zeros((2, *w.shape)), np.zeros(w.shape)
    for at in np.ndindex(*w.shape):
        first, second = (a[(*at[:-2], j, at[-2] // node.group, at[-1])] for j in range(2))
        b1 = 1 if w[at] - (first + second) / 2 >= 0 else 0
        b2 = 1 if -(w[at] - first * b1 - second / 2) >= 0 else 0
        planes[(0, *at)], planes[(1, *at)] = b1, b2
        dense[at] = first * b1 + second * b2
    return planes, dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_is_two_scaled_planes(dtype):
    node = make(dtype=dtype)
    planes, dense = loops64(node)
    np.testing.assert_allclose(dense_of(node), dense, rtol=0, atol=1e-6)
    levels = np.repeat(np.asarray(node.a, np.float64), GROUP, axis=2)[:, :, :40]
    terms = list(node.paths())
    assert len(terms) == node.k == 2 and node.shape == node.latent.shape
    for j, term in enumerate(terms):
        np.testing.assert_allclose(term, levels[:, j] * planes[j], rtol=1e-6)
    got = dual_binary(node.latent, node.a, GROUP, jnp.bfloat16)
    np.testing.assert_array_equal(got, node.dense().astype(jnp.bfloat16))


def test_a_weight_on_a_threshold_takes_the_plane():
    # H(0) = 1: at w = (a_1 + a_2) / 2 = 0.25 the first plane is taken, and then w - a_1 = -0.75
    # lies below a_2 / 2, so the second too; at w = a_2 / 2 = -0.25 the second alone.
    node = DualBinary(jnp.array([[0.25], [-0.25], [0.75]]), jnp.array([[[1.0]], [[-0.5]]]), 3)
    np.testing.assert_array_equal(dense_of(node)[:, 0], [0.5, -0.5, 0.5])


def test_the_start_levels_round_to_the_nearest():
    w = jnp.linspace(-2.0, 3.0, 501)[:, None] + 1e-4
    node = DualBinary(w, jnp.array([[[2.0]], [[-1.0]]]), 501)
    want = np.clip(np.rint(np.asarray(w)), -1, 2)
    np.testing.assert_array_equal(dense_of(node), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_is_the_written_formulas(dtype):
    node = make(dtype=dtype)
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda node: jnp.sum(node.dense() * cotangent)))(node)
    planes, _ = loops64(node)
    da = np.zeros(node.a.shape)
    for at in np.ndindex(*node.shape):
        for j in range(2):
            of = (*at[:-2], j, at[-2] // GROUP, at[-1])
            da[of] += np.float64(cotangent[at]) * planes[(j, *at)]
    np.testing.assert_allclose(got.a, da, rtol=0, atol=2e-5)
    assert got.latent.dtype == node.latent.dtype
    np.testing.assert_array_equal(got.latent, cotangent.astype(node.latent.dtype))


def test_residuals_are_the_inputs_only():
    leaves = jax.tree.leaves(make(dtype="bfloat16"))
    saved = jax.eval_shape(lambda *a: jax.vjp(lambda *b: dual_binary(*b, GROUP), *a)[1], *leaves)
    assert sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(saved)) == sorted(
        (x.shape, str(x.dtype)) for x in leaves
    )


def test_packing_keeps_the_planes_and_rounds_the_levels():
    node = make(i=300)
    packed = node.pack("w")
    assert isinstance(packed, PackedDualBinary) and packed.pack("w") is packed
    assert packed.bits.dtype == jnp.uint8 and packed.bits.shape == (2, 2, 12, 64)
    assert packed.a.dtype == jnp.float16 and packed.k == 2
    planes, _ = loops64(node)
    for j in range(2):
        np.testing.assert_array_equal(unpack_codes(packed.bits[:, j : j + 1], 300), planes[j])
    bound = sum(2.0**-11 * np.abs(term) for term in node.paths()) + 1e-6
    assert (np.abs(dense_of(packed) - dense_of(node)) <= bound).all()
    np.testing.assert_allclose(sum(packed.paths()), dense_of(packed), rtol=0, atol=1e-6)
    x = jax.random.normal(jax.random.key(0), (3, 300))
    one = jax.tree.map(lambda a: a[1], packed)
    want = np.asarray(x, np.float64) @ np.asarray(dense_of(packed), np.float64)[1]
    np.testing.assert_allclose(product(one, x), want, atol=2e-4)
    assert product(one, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("i", [256, 300])
def test_sizes_are_those_of_the_bytes(i):
    node = make(i=i)
    packed = node.pack("w")
    held = sum(array.nbytes for array in stored_parts(packed).values())
    n = -(-i // GROUP)
    nominal = 2 + 32 * n / i
    assert 8 * held / (2 * i * 12) == pytest.approx(nominal + 2 * (-i % 64) / i, rel=1e-12)
    for weight in (node, packed, jax.eval_shape(lambda: node), jax.eval_shape(lambda: packed)):
        assert weight.shape == (2, i, 12)
        assert weight.deployed_bytes() == held
        assert weight.bits_per_weight() == pytest.approx(nominal, rel=1e-12)
        assert weight.cost() == (2 * 2 * n * 12, 2 * 2 * (i + n) * 12, 0, held)


def test_the_header_gives_back_the_shapes():
    packed = make(i=300, lead=()).pack("w")
    header = json.loads(json.dumps(packed.header()))
    assert header == {"type": "dual_binary", "in": 300, "out": 12, "group": GROUP}
    assert PackedDualBinary.abstract(header) == jax.eval_shape(lambda: packed)
    assert make(i=300).pack("w").header() == header


def test_levels_may_be_0_but_must_fit_16_bits():
    node = make()
    zero = node.replace(a=node.a.at[1, 0, 0, 5].set(0.0)).pack("w")
    assert float(zero.a[1, 0, 0, 5]) == 0
    for value in (np.inf, np.nan, -7e4):
        spoilt = node.replace(a=node.a.at[1, 1, 2, 5].set(value))
        with pytest.raises(BadInput, match=r"^layers/q/kernel: level a\[1, 1, 2, 5\]"):
            spoilt.pack("layers/q/kernel")


def test_roles_name_every_leaf():
    assert jax.tree.leaves(make().roles()) == ["latent", "level"]
    assert jax.tree.leaves(make().pack("w").roles()) == ["code", "level"]
