"""`GroupUniform` and its packed form against float64 NumPy loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.weights.group_levels import pack_codes, unpack_codes
from rabit_jax.weights.group_uniform import GroupUniform, PackedGroupUniform, group_uniform

GROUP = 16
dense_of = jax.jit(lambda node: node.dense())
product = jax.jit(lambda node, x: node.matmul(x))
EACH_BITS = pytest.mark.parametrize("bits", [1, 2, 3])


def make(bits=2, i=40, o=12, lead=(2,), dtype="float32", group=GROUP):
    """Levels at random, so that clipping happens on both sides; i need not be whole groups."""
    rng = np.random.default_rng(bits)
    n = -(-i // group)
    w = rng.normal(size=(*lead, i, o))
    s = rng.uniform(0.3, 0.9, (*lead, n, o))
    c = rng.normal(-0.8, 0.3, (*lead, n, o))
    return GroupUniform(
        jnp.asarray(w, dtype), jnp.asarray(s, jnp.float32), jnp.asarray(c, jnp.float32), group, bits
    )


def loops64(node):
    """Codes and `W_hat` in float64, element by element."""
    w, s, c = (np.asarray(a).astype(np.float64) for a in (node.latent, node.s, node.c))
    codes, dense = np.zeros(w.shape), np.zeros(w.shape)
    for at in np.ndindex(*w.shape):
        of = (*at[:-2], at[-2] // node.group, at[-1])
        codes[at] = min(max(np.rint((w[at] - c[of]) / s[of]), 0), 2**node.bits - 1)
        dense[at] = s[of] * codes[at] + c[of]
    return codes, dense


@EACH_BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_is_the_nearest_level_of_the_group(bits, dtype):
    node = make(bits, dtype=dtype)
    codes, dense = loops64(node)
    assert {0, 2**bits - 1} <= set(np.unique(codes))
    np.testing.assert_array_equal(node.codes(), codes)
    np.testing.assert_allclose(dense_of(node), dense, rtol=0, atol=2e-6)
    (path,) = node.paths()
    np.testing.assert_allclose(path, dense_of(node), rtol=0, atol=1e-6)
    assert node.shape == dense.shape and not hasattr(node, "k")


def test_the_sum_is_taken_in_float32_and_rounded_once():
    node = make(2, lead=())
    got = group_uniform(node.latent, node.s, node.c, GROUP, 2, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, node.dense().astype(jnp.bfloat16))
    x = jax.random.normal(jax.random.key(0), (3, 40)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(node.matmul(x), x @ got)


@EACH_BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_is_the_written_formulas(bits, dtype):
    node = make(bits, dtype=dtype)
    cotangent = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda node: jnp.sum(node.dense() * cotangent)))(node)
    codes, _ = loops64(node)
    ds, dc = np.zeros(node.s.shape), np.zeros(node.s.shape)
    for at in np.ndindex(*node.shape):
        of = (*at[:-2], at[-2] // GROUP, at[-1])
        ds[of] += np.float64(cotangent[at]) * codes[at]
        dc[of] += np.float64(cotangent[at])
    np.testing.assert_allclose(got.s, ds, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got.c, dc, rtol=0, atol=2e-5)
    assert got.latent.dtype == node.latent.dtype and got.s.dtype == jnp.float32
    np.testing.assert_array_equal(got.latent, cotangent.astype(node.latent.dtype))


def test_residuals_are_the_inputs_only():
    node = make(2, dtype="bfloat16")
    leaves = jax.tree.leaves(node)
    saved = jax.eval_shape(lambda *a: jax.vjp(group_uniform, *a)[1], *leaves)
    assert sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(saved)) == sorted(
        (x.shape, str(x.dtype)) for x in leaves
    )


@EACH_BITS
def test_packing_keeps_the_codes_and_rounds_the_levels(bits):
    node = make(bits, i=300)
    packed = node.pack("w")
    assert isinstance(packed, PackedGroupUniform) and packed.pack("w") is packed
    assert packed.bits.dtype == jnp.uint8 and packed.bits.shape == (2, bits, 12, 64)
    assert packed.s.dtype == packed.c.dtype == jnp.float16
    np.testing.assert_array_equal(packed.codes(), node.codes())
    s, c = (np.repeat(np.asarray(a, np.float64), GROUP, axis=1)[:, :300] for a in (node.s, node.c))
    bound = 2.0**-11 * (s * np.asarray(node.codes()) + np.abs(c)) + 1e-6
    assert (np.abs(np.asarray(dense_of(packed) - dense_of(node), np.float64)) <= bound).all()
    np.testing.assert_array_equal(next(packed.paths()), packed.dense())
    assert jax.tree.structure(packed.roles()) == jax.tree.structure(packed)
    x = jax.random.normal(jax.random.key(0), (3, 300))
    one = jax.tree.map(lambda a: a[1], packed)
    want = np.asarray(x, np.float64) @ np.asarray(dense_of(packed), np.float64)[1]
    np.testing.assert_allclose(product(one, x), want, atol=2e-4)


def test_planes_hold_the_bits_of_the_codes():
    codes = np.random.default_rng(0).integers(0, 8, (2, 300, 5)).astype(np.uint8)
    planes = pack_codes(jnp.asarray(codes), 3)
    for layer, p, row, n in [(0, 0, 0, 0), (1, 2, 4, 299), (0, 1, 3, 37), (1, 0, 2, 255)]:
        block, p_in, byte = n // 256, n % 256 // 32, n % 32
        stored = int(planes[layer, p, row, 32 * block + byte]) >> p_in & 1
        assert stored == int(codes[layer, n, row]) >> p & 1
    np.testing.assert_array_equal(unpack_codes(planes, 300), codes)


@pytest.mark.parametrize("i", [256, 300])
def test_sizes_are_those_of_the_bytes(i):
    node = make(3, i=i)
    packed = node.pack("w")
    held = sum(array.nbytes for array in stored_parts(packed).values())
    n = -(-i // GROUP)
    nominal = 3 + 32 * n / i
    assert 8 * held / (2 * i * 12) == pytest.approx(nominal + 3 * (-i % 64) / i, rel=1e-12)
    for weight in (node, packed, jax.eval_shape(lambda: node), jax.eval_shape(lambda: packed)):
        assert weight.shape == (2, i, 12)
        assert weight.deployed_bytes() == held
        assert weight.bits_per_weight() == pytest.approx(nominal, rel=1e-12)
        assert weight.cost() == (2 * 2 * n * 12, 2 * 3 * (i + n) * 12, 0, held)


def test_the_header_gives_back_the_shapes():
    packed = make(3, i=300, lead=()).pack("w")
    header = json.loads(json.dumps(packed.header()))
    assert header == {"type": "group_uniform", "in": 300, "out": 12, "bits": 3, "group": GROUP}
    assert PackedGroupUniform.abstract(header) == jax.eval_shape(lambda: packed)
    assert PackedGroupUniform.abstract(header).deployed_bytes() == packed.deployed_bytes()
    assert make(3, i=300).pack("w").header() == header


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [("s", 0.0, r"scale s\[1, 0, 5\]"), ("s", -1.0, "scale s"), ("s", 1e-6, "scale s"),
     ("s", 1e6, "scale s"), ("c", np.nan, r"level c\[1, 0, 5\] is nan"), ("c", -1e6, "level c")],
    ids=str,
)  # fmt: skip
def test_levels_out_of_the_float16_range_are_refused_by_name(leaf, value, message):
    node = make(2)
    spoilt = node.replace(**{leaf: getattr(node, leaf).at[1, 0, 5].set(value)})
    with pytest.raises(BadInput, match=rf"^layers/q/kernel: {message}"):
        spoilt.pack("layers/q/kernel")


def test_roles_name_every_leaf():
    assert jax.tree.leaves(make(2).roles()) == ["latent", "scale", "level"]
    assert jax.tree.leaves(make(2).pack("w").roles()) == ["code", "scale", "level"]
