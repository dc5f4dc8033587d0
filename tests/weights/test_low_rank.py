"""`LowRankSign` and `PackedLowRank` against float64 NumPy: forward, every gradient, packing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax import BadInput
from rabit_jax.formats.packed_file import stored_parts
from rabit_jax.types import Weight
from rabit_jax.weights.costs import Cost
from rabit_jax.weights.low_rank_sign import FACTOR_STE, LowRankSign, PackedLowRank, factor_sign
from rabit_jax.weights.seam import linear

I, O, R = 24, 20, 8
EACH_C = pytest.mark.parametrize("c", [1, 2])
EACH_TYPE = pytest.mark.parametrize(
    ("ste", "dtype"), [*((ste, "float32") for ste in FACTOR_STE), ("smooth", "bfloat16")]
)
matmul = jax.jit(linear)
TERM = "...ci,...cir,...cr,...cro,...co"


def make(c=2, lead=(), ste="smooth", dtype="float32", seed=0, shape=(I, O, R)):
    rng = np.random.default_rng(seed + 10 * c)
    i, o, r = shape

    def latent(*shape):
        # Of every size, so that each rule has elements on both sides of its bend.
        v = rng.normal(size=(*lead, c, *shape)) * rng.choice([0.01, 1.0], (*lead, c, *shape))
        v[..., :2, :2] = [[0.0, -0.0], [1.0, -1.0]]
        return jnp.asarray(v, dtype)

    scales = (0.5 * rng.uniform(0.5, 1.5, (*lead, c, n)) for n in (i, r, o))
    h, l, g = (jnp.asarray(s, jnp.float32) for s in scales)
    return LowRankSign(latent(i, r), latent(r, o), h, l, g, ste)


def as64(node):
    """h, sign(U), l, sign(V), g in float64, with sign(0) = +1, in the order of `TERM`."""
    u, v, h, l, g = (np.asarray(a).astype(np.float64) for a in jax.tree.leaves(node))
    sign = lambda x: np.where(x >= 0, 1.0, -1.0)  # noqa: E731
    return h, sign(u), l, sign(v), g


def terms64(node):
    return np.einsum(f"{TERM}->...cio", *as64(node))


def slope64(latent, ste):
    x = np.asarray(latent).astype(np.float64)
    rules = {
        "smooth": 100 * (1 - np.tanh(100 * x) ** 2),
        "clipped": ((x > -1) & (x < 1)) * 1.0,
        "identity": np.ones_like(x),
    }
    return rules[ste]


def gradients64(node, grad):
    """`G = dL/dW_hat` -> gradients of u, v, h, l, g, each a sum over all other letters."""
    parts, letters = as64(node), TERM.split(",")

    def of(n):
        rest = [letters[m] for m in range(5) if m != n]
        others = [parts[m] for m in range(5) if m != n]
        return np.einsum(",".join(["...io", *rest]) + "->" + letters[n], grad, *others)

    u, v = of(1) * slope64(node.u, node.ste), of(3) * slope64(node.v, node.ste)
    return {"u": u, "v": v, "h": of(0), "l": of(2), "g": of(4)}


def near(got, want, tolerance):
    got, want = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def layer(tree, n):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[n]), tree)


@EACH_C
@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_dense_and_paths_are_the_written_sum(c, lead):
    node = make(c, lead)
    want = terms64(node)
    assert isinstance(node, Weight) and node.k == c and node.rank == R
    assert node.shape == node.dense().shape == (*lead, I, O) and node.dense().dtype == jnp.float32
    near(node.dense(), want.sum(-3), 1e-6)
    near(np.stack(list(node.paths()), axis=-3), want, 1e-6)


@pytest.mark.parametrize(
    ("c", "dtype", "tolerance"), [(1, "float32", 1e-6), (2, "float32", 1e-6), (2, "bfloat16", 1e-2)]
)
def test_matmul_is_the_product_with_the_dense_matrix(c, dtype, tolerance):
    node = make(c)
    for x in (np.random.default_rng(1).normal(size=shape) for shape in [(3, 5, I), (I,)]):
        x = jnp.asarray(x, dtype)
        for weight in (node, node.pack("w")):
            y = matmul(x, weight)
            assert y.dtype == x.dtype
            near(y, np.asarray(x, np.float64) @ np.asarray(weight.dense(), np.float64), tolerance)


def test_matmul_builds_no_matrix():
    node = make(2, shape=(48, 40, R))
    x = jnp.ones((3, 48))
    for weight in (node, node.pack("w")):
        text = str(jax.make_jaxpr(lambda x, w: w.matmul(x))(x, weight))
        assert "[48,40]" not in text and "[40,48]" not in text


@EACH_C
@EACH_TYPE
def test_gradients_through_dense_are_the_written_ones(c, ste, dtype):
    node = make(c, (2,), ste, dtype)
    grad = np.random.default_rng(3).normal(size=node.shape).astype(np.float32)
    got = jax.jit(jax.grad(lambda node: jnp.sum(node.dense() * grad)))(node)
    for name, want in gradients64(node, grad.astype(np.float64)).items():
        assert getattr(got, name).dtype == getattr(node, name).dtype
        tolerance = 4e-3 if dtype == "bfloat16" and name in "uv" else 1e-5
        near(getattr(got, name), want, tolerance)


@EACH_C
@EACH_TYPE
def test_gradients_through_matmul_are_the_written_ones(c, ste, dtype):
    tolerance = {"float32": 1e-5, "bfloat16": 1.5e-2}[dtype]
    node = make(c, (), ste)
    rng = np.random.default_rng(4)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, 7, n)), dtype) for n in (I, O))
    loss = lambda node, x: jnp.sum((node.matmul(x) * cotangent).astype(jnp.float32))  # noqa: E731
    got, got_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(node, x)
    x64, c64 = (np.asarray(a, np.float64).reshape(14, -1) for a in (x, cotangent))
    for name, want in gradients64(node, x64.T @ c64).items():
        assert getattr(got, name).dtype == jnp.float32
        near(getattr(got, name), want, tolerance)
    assert got_x.dtype == x.dtype
    near(np.asarray(got_x).reshape(14, I), c64 @ terms64(node).sum(0).T, tolerance)


def test_each_rule_at_its_bend():
    x = jnp.asarray([-1.0, -0.999, -0.0, 0.0, 0.01, 0.999, 1.0, 3.0])
    slope = {s: jax.grad(lambda x, s=s: jnp.sum(factor_sign(x, s) * 2.0))(x) for s in FACTOR_STE}
    np.testing.assert_array_equal(factor_sign(x), [-1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(slope["clipped"], [0, 2, 2, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(slope["identity"], np.full(8, 2.0))
    np.testing.assert_allclose(slope["smooth"][2:5], [200, 200, 200 * 0.41997434], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(slope["smooth"])[[0, 1, 5, 6, 7]], 0)


def test_it_trains_through_scan_remat_and_jit():
    node = make(2, (3,), "clipped")
    x = jax.random.normal(jax.random.key(0), (5, I)) * 0.1
    back = jax.random.normal(jax.random.key(1), (O, I)) * 0.05

    def block(x, one):
        return jnp.tanh(one.matmul(x) @ back)

    def scanned(node):
        step = jax.checkpoint(lambda x, one: (block(x, one), None))
        return jnp.sum(jax.lax.scan(step, x, node)[0] ** 2)

    def unrolled(node):
        y = x
        for n in range(3):
            y = block(y, jax.tree.map(lambda leaf, n=n: leaf[n], node))
        return jnp.sum(y**2)

    got, want = (jax.jit(jax.grad(f))(node) for f in (scanned, unrolled))
    assert got.ste == "clipped"
    jax.tree.map(lambda a, b: near(a, b, 1e-4), got, want)


def test_rescaling_moves_both_diagonals_into_the_scales():
    node = make(2, (3,))
    rng = np.random.default_rng(6)
    d_in, d_out = (rng.uniform(0.5, 2, (3, n)).astype(np.float32) for n in (I, O))
    want = d_in[..., None] * terms64(node).sum(-3) * d_out[:, None]
    near(node.rescaled(jnp.asarray(d_in), jnp.asarray(d_out)).dense(), want, 1e-6)


def test_roles_name_every_leaf():
    node = make(2, ste="clipped")
    assert jax.tree.leaves(node.roles()) == ["latent"] * 2 + ["scale"] * 3
    assert jax.tree.leaves(node.pack("w").roles()) == ["sign"] * 2 + ["scale"] * 3
    assert jax.tree.structure(node.roles()) == jax.tree.structure(node)


def loop_unpack(row, count):
    """Element 256 n + 32 p + j is bit p of byte j of block n; 1 is +1."""
    bit = lambda n: (int(row[32 * (n // 256) + n % 32]) >> (n % 256 // 32)) & 1  # noqa: E731
    return np.array([2 * bit(n) - 1 for n in range(count)])


@pytest.fixture(scope="module")
def uneven():
    """Two layers of 300 inputs (padded to 512), 31 outputs (padded to 256), rank 5."""
    node = make(2, (2,), "clipped", shape=(300, 31, 5))
    return node, node.pack("w")


def test_bits_are_the_signs_of_the_factors(uneven):
    node, packed = uneven
    assert packed.u_bits.dtype == packed.v_bits.dtype == jnp.uint8
    assert packed.u_bits.shape == (2, 2, 5, 64) and packed.v_bits.shape == (2, 2, 5, 32)
    assert packed.h.dtype == packed.l.dtype == packed.g.dtype == jnp.float16
    _, u, _, v, _ = as64(node)
    rows = [np.asarray(bits) for bits in (packed.u_bits, packed.v_bits)]
    for n, c, r in np.ndindex(2, 2, 5):
        np.testing.assert_array_equal(loop_unpack(rows[0][n, c, r], 300), u[n, c, :, r])
        np.testing.assert_array_equal(loop_unpack(rows[1][n, c, r], 31), v[n, c, r])
    stacked = np.concatenate([u, np.swapaxes(v, -1, -2)], axis=-2)
    for weight in (node, packed):
        np.testing.assert_array_equal(weight.positive(), stacked > 0)
        assert weight.positive().dtype == bool


def test_packing_keeps_the_weight(uneven):
    node, packed = uneven
    assert packed.pack("w") is packed and isinstance(packed, Weight)
    # float16 rounds each of the three factors by at most 2^-11.
    near(packed.dense(), node.dense(), 1.6e-3)
    near(np.stack(list(packed.paths()), axis=-3), terms64(node), 1.6e-3)


def test_packing_balances_the_scales_and_keeps_their_product():
    node = make(2, (2,))
    node = node.replace(h=node.h * 3e4, l=node.l * 1e-6)
    before = [np.asarray(s, np.float64) for s in (node.h, node.l, node.g)]
    packed = node.pack("w")
    after = [np.asarray(s, np.float64) for s in (packed.h, packed.l, packed.g)]
    means = [np.exp(np.log(s).mean(-1)) for s in after]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3)
    np.testing.assert_allclose(means[1], means[2], rtol=1e-3)
    want, got = (np.einsum("lci,lcr,lco->lciro", *scales) for scales in (before, after))
    np.testing.assert_allclose(got, want, rtol=1.6e-3)


def test_packed_matmul_scans_over_layers(uneven):
    _, packed = uneven
    x = np.random.default_rng(9).normal(size=(3, 5, 300)).astype(np.float32)
    y = jax.jit(lambda s: jax.lax.scan(lambda c, w: (c, linear(x, w)), 0, s)[1])(packed)
    near(y, x.astype(np.float64) @ np.asarray(packed.dense(), np.float64)[:, None], 1e-6)
    for n in range(2):
        np.testing.assert_array_equal(layer(packed, n).dense(), np.asarray(packed.dense())[n])


@pytest.mark.parametrize("which", ["h", "l", "g"])
@pytest.mark.parametrize("value", [0.0, 1e-9, np.inf, np.nan], ids=str)
def test_a_scale_that_16_bits_cannot_hold_is_named(which, value):
    node = make(2)
    spoilt = node.replace(**{which: getattr(node, which).at[1, 5].set(value)})
    with pytest.raises(BadInput, match=rf"^layers/v/kernel: scale {which}\[1, 5\]"):
        spoilt.pack("layers/v/kernel")


@EACH_C
def test_bits_are_bytes_where_256_divides_both_sides(c):
    node = make(c, (3,), shape=(256, 512, R))
    packed = node.pack("w")
    held = sum(array.nbytes for array in stored_parts(packed).values())
    want = c * (R * (256 + 512) + 16 * (256 + 512 + R)) / (256 * 512)
    for weight in (node, packed, jax.eval_shape(lambda: node)):
        assert weight.bits_per_weight() == pytest.approx(want, rel=1e-12)
        assert weight.deployed_bytes() == held == 3 * want * 256 * 512 / 8


def test_sizes_and_cost_need_shapes_only(uneven):
    node, packed = uneven
    held = sum(array.nbytes for array in stored_parts(packed).values())
    want = Cost(2 * 2 * (300 + 5 + 31), 2 * 2 * 5 * (300 + 31), 0, held)
    for weight in (node, packed, jax.eval_shape(lambda: node), jax.eval_shape(lambda: packed)):
        assert weight.shape == (2, 300, 31) and weight.k == 2 and weight.rank == 5
        assert weight.deployed_bytes() == held and weight.cost() == want


def test_the_header_restores_the_shapes_of_one_matrix(uneven):
    one = layer(uneven[1], 0)
    header = json.loads(json.dumps(one.header()))
    assert header == {"type": "low_rank", "in": 300, "out": 31, "rank": 5, "copies": 2}
    assert uneven[1].header() == header
    assert PackedLowRank.abstract(header) == jax.eval_shape(lambda: one)
