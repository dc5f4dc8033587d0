"""`pack` and `PackedSign`: bits, balanced 16-bit scales, refusals and sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.signs.ste import coupled_signs
from rabit_jax.weights.conversion import pack
from rabit_jax.weights.sign_paths import PackedSign, balance

EACH_K = pytest.mark.parametrize("k", [1, 2, 3, 4])


def loop_unpack(bits, inputs):
    """Input 256 c + 32 p + j is bit p of byte j of block c: int `[o, i]` of -1 and +1."""
    out = np.zeros((bits.shape[0], inputs), int)
    for row in range(bits.shape[0]):
        for n in range(inputs):
            c, p, j = n // 256, n % 256 // 32, n % 32
            out[row, n] = 2 * ((int(bits[row, 32 * c + j]) >> p) & 1) - 1
    return out


def dense64(packed):
    """`W_hat` in float64 from the stored leaves of one layer, bit by bit."""
    bits, g, h = (np.asarray(a) for a in (packed.bits, packed.g, packed.h))
    g, h = g.astype(np.float64), h.astype(np.float64)
    return sum(
        h[n][:, None] * loop_unpack(bits[n], h.shape[-1]).T * g[n][None, :] for n in range(len(g))
    )


@pytest.fixture(scope="module")
def pairs(make_node):
    """`{k: (node, packed)}`, two layers of 300 inputs (padded to 512) and 31 outputs."""
    dtypes = {1: "float32", 2: "bfloat16", 3: "float32", 4: "bfloat16"}
    nodes = {k: make_node(k, 300, 31, (2,), dtype) for k, dtype in dtypes.items()}
    return {k: (node, node.pack("w")) for k, node in nodes.items()}


def first(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), tree)


@EACH_K
def test_bits_are_the_coupled_signs(k, pairs):
    node, packed = pairs[k]
    assert packed.bits.dtype == jnp.uint8 and packed.bits.shape == (2, k, 31, 64)
    assert packed.g.dtype == packed.h.dtype == jnp.float16
    positive = np.asarray(jax.jit(coupled_signs)(node.latent, node.g, node.h))
    np.testing.assert_array_equal(packed.positive(), positive)
    np.testing.assert_array_equal(packed.signs(), np.where(positive, 1, -1))
    bits = np.asarray(packed.bits)
    for layer, n in np.ndindex(2, k):
        np.testing.assert_array_equal(loop_unpack(bits[layer, n], 300).T > 0, positive[layer, n])


def test_bits_come_from_the_scales_before_rounding(make_node):
    # Latents placed inside the gap between a and its float16 rounding: the second sign tells which
    # of the two was used.
    node = make_node(2, 64, 64, seed=4)
    a = np.asarray(node.h[0])[:, None] * np.asarray(node.g[0])[None, :]
    plain = node.replace(latent=jnp.asarray(a)).pack("w")
    rounded = np.outer(np.asarray(plain.h[0], np.float64), np.asarray(plain.g[0], np.float64))
    between = (a.astype(np.float64) + rounded) / 2
    node = node.replace(latent=jnp.asarray(between, jnp.float32))
    clear = np.abs(a - rounded) > 1e-5
    assert clear.mean() > 0.9
    got = np.asarray(node.pack("w").positive())[1]
    np.testing.assert_array_equal(got[clear], (between > a)[clear])


@EACH_K
def test_balanced_scales_leave_the_weight_unchanged(k, pairs):
    node, packed = pairs[k]
    g, h = (np.asarray(a, np.float64) for a in balance(node.g, node.h))
    np.testing.assert_allclose(
        np.exp(np.log(g).mean(-1)), np.exp(np.log(h).mean(-1)), rtol=1e-5
    )
    np.testing.assert_allclose(
        h[..., :, None] * g[..., None, :],
        np.asarray(node.h, np.float64)[..., :, None] * np.asarray(node.g, np.float64)[..., None, :],
        rtol=1e-5,
    )
    means = [np.exp(np.log(np.asarray(a, np.float64)).mean(-1)) for a in (packed.g, packed.h)]
    np.testing.assert_allclose(means[0], means[1], rtol=5e-4)

    # float16 rounds each factor by at most 2^-11, so each path by about 2^-10 of a_i.
    size = sum(np.asarray(h[:, n, :, None] * g[:, n, None, :]) for n in range(k))
    error = np.abs(np.asarray(packed.dense(), np.float64) - np.asarray(node.dense(), np.float64))
    assert (error <= 1.01 * 2**-10 * size).all()


@pytest.mark.parametrize("k", [1, 3])
def test_packed_dense_is_its_bits_and_scales(k, pairs):
    packed = first(pairs[k][1])
    got = jax.jit(PackedSign.dense)(packed)
    np.testing.assert_allclose(got, dense64(packed), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("bfloat16", 4e-3), ("float16", 1e-3)]
)
def test_packed_matmul_is_the_product(dtype, tolerance, pairs):
    packed = first(pairs[2][1])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 300)), dtype)
    y = packed.matmul(x)
    assert y.dtype == x.dtype and y.shape == (2, 3, 31)
    want = np.asarray(x, np.float64) @ dense64(packed)
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert error < tolerance


def _spoil(node, which, value):
    scale = getattr(node, which)
    return node.replace(**{which: scale.at[1, 5].set(value)})


@pytest.mark.parametrize("which", ["g", "h"])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-7, -1e-7, 1e8, np.inf, -np.inf, np.nan], ids=str
)
def test_scales_out_of_the_float16_range_are_refused_by_name(which, value, make_node):
    good = make_node(2, 16, 12)
    tree = {"layers": {"q": {"kernel": good}, "v": {"kernel": _spoil(good, which, value)}}}
    with pytest.raises(BadInput, match=r"^layers/v/kernel: "):
        pack(tree)


@pytest.mark.parametrize("which", ["g", "h"])
def test_a_refusal_points_at_the_scale_that_is_wrong(which, make_node):
    with pytest.raises(BadInput, match=rf"scale {which}\[1, 5\]"):
        _spoil(make_node(2, 16, 12), which, 0.0).pack("w")


def test_negative_scales_are_kept(make_node):
    node = make_node(2, 16, 12)
    node = node.replace(g=node.g.at[1, 3].multiply(-1))
    packed = node.pack("w")
    assert float(packed.g[1, 3]) < 0
    np.testing.assert_allclose(packed.dense(), node.dense(), atol=4e-3)


def test_sizes_are_those_of_the_bytes(pairs, make_node):
    whole = make_node(2, 256, 20, (2,))
    for node, packed in [*pairs.values(), (whole, whole.pack("w"))]:
        k = node.k
        *lead, i, o = node.shape
        held = sum(array.nbytes for array in stored_parts(packed).values())
        nominal = k + 16 * k * (i + o) / (i * o)
        padding = k * (-i % 64) / i
        assert 8 * held / (2 * i * o) == pytest.approx(nominal + padding, rel=1e-12)
        for weight in (node, packed):
            assert weight.deployed_bytes() == held
            assert weight.bits_per_weight() == pytest.approx(nominal, rel=1e-12)
            assert weight.shape == (*lead, i, o) and weight.k == k
