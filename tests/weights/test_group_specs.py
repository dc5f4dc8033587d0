"""`GroupUniformSpec` against round-to-nearest, `DualBinarySpec` against a brute-force search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats, importance
from rabit_jax.weights.dual_binary import DualBinarySpec
from rabit_jax.weights.group_uniform import GroupUniformSpec
from rabit_jax.weights.rounding import round_to_nearest

GROUP = 16
dense_of = jax.jit(lambda node: node.dense())
nearest = jax.jit(round_to_nearest, static_argnums=(1, 2))


def kernel(lead=(2,), i=40, o=12, seed=0):
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=(*lead, 1, o))  # some columns hardly cross 0
    return jnp.asarray(rng.normal(size=(*lead, i, o)) + shift, jnp.float32)


def ties(bits):
    """Columns whose weights lie on and halfway between the levels, and all-positive ones.

    A step of 0.25 and 2^bits levels from any zero point: every multiple of half a step is exact.
    """
    top = 2**bits - 1
    columns = []
    for zero in range(top + 1):
        half_steps = np.arange(-2 * zero, 2 * (top - zero) + 1)
        columns.append(0.125 * np.resize(half_steps, 4 * top + 8))
    return jnp.asarray(np.stack(columns, axis=1), jnp.float32)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_the_start_is_round_to_nearest(bits, lead):
    w = kernel(lead, seed=bits)
    spec = GroupUniformSpec(bits=bits, group=GROUP)
    node = spec.init(w)
    assert node.group == GROUP and node.bits == bits and node.latent.dtype == jnp.float32
    np.testing.assert_array_equal(node.latent, w)
    np.testing.assert_array_equal(dense_of(node), nearest(w, bits, GROUP))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights_halfway_between_two_levels_take_the_same_one(bits):
    w = ties(bits)
    node = GroupUniformSpec(bits=bits, group=w.shape[0]).init(w)
    want = nearest(w, bits, w.shape[0])
    assert len(np.unique(want)) > 2**bits  # each column has a zero point of its own
    np.testing.assert_array_equal(dense_of(node), want)


def test_many_near_ties_take_the_same_level():
    # Steps without a short binary form: half-steps are rounded, so ties are won or lost by bits.
    rng = np.random.default_rng(0)
    s = rng.uniform(0.01, 1, 500).astype(np.float32)
    w = np.concatenate([s * k / 2 for k in range(-4, 3)]).reshape(7, 500)
    spec = GroupUniformSpec(bits=2, group=7)
    node = spec.init(jnp.asarray(w))
    want = round_to_nearest(jnp.asarray(w), 2, 7)
    np.testing.assert_array_equal(spec.dense(node), want)
    np.testing.assert_array_equal(dense_of(node), want)
    np.testing.assert_array_equal(node.pack("w").codes(), node.codes())


def test_a_dead_group_packs_to_zeros():
    w = np.array(kernel((), i=32))
    w[:GROUP, 3], w[GROUP:, 5] = 0, 1e-12
    node = GroupUniformSpec(group=GROUP).init(jnp.asarray(w))
    packed = dense_of(node.pack("w"))
    np.testing.assert_array_equal(packed[:GROUP, 3], 0)
    np.testing.assert_array_equal(packed[GROUP:, 5], 0)
    others = np.delete(np.arange(12), 5)
    want = np.asarray(nearest(jnp.asarray(w), 2, GROUP))
    np.testing.assert_array_equal(np.asarray(dense_of(node))[:, others], want[:, others])


def search64(w, d_in, group):
    """The best s of the grid and its error `[n, o]`, with nearest levels, in float64."""
    w, d_in = np.asarray(w, np.float64), np.asarray(d_in, np.float64)
    n, o = -(-w.shape[0] // group), w.shape[1]
    best = np.zeros((n, o))
    for b, c in np.ndindex(n, o):
        values, weight = w[b * group : (b + 1) * group, c], d_in[b * group : (b + 1) * group] ** 2
        errors = []
        for f in range(1, 41):
            s = f / 40 * np.abs(values).max()
            levels = s * np.array([-1, 0, 1, 2])
            errors.append((weight * np.min((values[:, None] - levels) ** 2, axis=1)).sum())
        best[b, c] = (1 + np.argmin(errors)) / 40 * np.abs(values).max()
    return best


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(5)
    sizes = (np.exp(1.5 * rng.normal(size=(2, n))) for n in (40, 12))
    return Stats(*(jnp.asarray(s, jnp.float32) for s in sizes))


@pytest.mark.parametrize("weighted", [False, True])
def test_dual_binary_finds_the_best_of_the_grid(weighted, stats):
    w = kernel()
    spec = DualBinarySpec(group=GROUP, a_in=0.7)
    node = spec.init(w, stats if weighted else None)
    assert node.group == GROUP
    np.testing.assert_array_equal(node.latent, w)
    d_in = importance(stats.s_in, 0.7) if weighted else np.ones((2, 40))
    for layer in range(2):
        s = search64(w[layer], d_in[layer], GROUP)
        np.testing.assert_allclose(node.a[layer, 0], 2 * s, rtol=1e-6)
        np.testing.assert_allclose(node.a[layer, 1], -s, rtol=1e-6)
    np.testing.assert_array_equal(spec.dense(node), node.dense())


def test_the_last_group_may_be_short_and_dead_groups_are_kept():
    w = kernel((), i=35).at[32:, 3].set(0.0)
    node = DualBinarySpec(group=GROUP).init(w)
    assert node.a.shape == (2, 3, 12)
    assert np.isfinite(node.a).all() and (np.asarray(dense_of(node))[32:, 3] == 0).all()
    np.testing.assert_allclose(node.a[1], -search64(w, np.ones(35), GROUP), rtol=1e-6)


@pytest.mark.parametrize("spec", [GroupUniformSpec(), DualBinarySpec()], ids=str)
def test_specs_need_shapes_only(spec):
    w = jax.ShapeDtypeStruct((2, 300, 40), jnp.bfloat16)
    stats = Stats(*(jax.ShapeDtypeStruct((2, n), jnp.float32) for n in (300, 40)))
    node = jax.eval_shape(spec.init, w, stats)
    assert node.shape == (2, 300, 40) and node.deployed_bytes() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupUniformSpec(bits=9), "bits 9"),
        (lambda: GroupUniformSpec(bits=0), "bits 0"),
        (lambda: GroupUniformSpec(group=-1), "group -1"),
        (lambda: DualBinarySpec(group=0), "group is 0"),
    ],
    ids=["bits-9", "bits-0", "group--1", "dual-group-0"],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()
