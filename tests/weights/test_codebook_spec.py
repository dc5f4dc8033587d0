"""`CodebookSpec`: k-means against a float64 NumPy Lloyd, and what stages and importance bring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rabit_jax.errors import BadInput
from rabit_jax.signs.channel_importance import Stats, importance
from rabit_jax.weights import codebook
from rabit_jax.weights.codebook import CodebookSpec, draw, kmeans

M, O, D, ENTRIES = 15, 12, 4, 8
I = 58  # the last vector of each column is half padding
SMALL = CodebookSpec(stages=2, dim=D, bits=3, iterations=10)


def lloyd64(x, weight_in, weight_out, entries, iterations):
    """Codes and entries after each iteration, vector by vector."""
    x, weight_in, weight_out, entries = (
        np.asarray(a, np.float64) for a in (x, weight_in, weight_out, entries)
    )
    weight = weight_in[:, None, :] * weight_out[None, :, None]
    for turn in range(iterations + 1):
        missed = ((x[:, :, None, :] - entries) ** 2 * weight_in[:, None, None, :]).sum(-1)
        codes = missed.argmin(-1)
        if turn == iterations:
            return codes, entries
        entries = entries.copy()
        for e, j in np.ndindex(*entries.shape):
            total = weight[codes == e, j].sum()
            if total > 0:
                entries[e, j] = (weight[codes == e, j] * x[codes == e, j]).sum() / total


def error64(x, weight_in, weight_out, codes, entries):
    missed = (np.asarray(x, np.float64) - np.asarray(entries, np.float64)[np.asarray(codes)]) ** 2
    return np.einsum("mod,md,o->", missed, np.asarray(weight_in), np.asarray(weight_out))


@pytest.fixture(scope="module")
def data():
    """Vectors, weights and a start in which the last entry is out of everybody's reach."""
    rng = np.random.default_rng(0)
    weight_in = np.exp(rng.normal(size=(M, D)))
    weight_in[-1, 2:] = 0
    start = rng.normal(size=(ENTRIES, D))
    start[-1] = 50
    arrays = rng.normal(size=(M, O, D)), weight_in, np.exp(rng.normal(size=O)), start
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.fixture(scope="module")
def run(data):
    return jax.jit(lambda iterations: kmeans(*data, iterations))


@pytest.mark.parametrize("iterations", [0, 1, 2, 12])
def test_kmeans_is_the_float64_iteration(iterations, data, run):
    codes, entries = run(iterations)
    want_codes, want = lloyd64(*data, iterations)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_allclose(entries, want, rtol=0, atol=1e-5)


def test_an_empty_cell_keeps_its_entry(run):
    codes, entries = run(5)
    np.testing.assert_array_equal(entries[-1], 50)
    assert ENTRIES - 1 not in np.asarray(codes)


def test_the_error_never_rises(data, run):
    errors = [error64(*data[:3], *run(t)) for t in range(12)]
    assert (np.diff(errors) <= 1e-6 * errors[0]).all() and errors[-1] < 0.8 * errors[0]


def test_the_pieces_change_nothing(data, run, monkeypatch):
    whole = run(4)
    monkeypatch.setattr(codebook, "SCORES", 4 * O * ENTRIES)  # 4 of 15 rows at a time
    codes, entries = jax.jit(kmeans)(*data, 4)
    np.testing.assert_array_equal(codes, whole[0])
    np.testing.assert_allclose(entries, whole[1], rtol=0, atol=1e-5)


def test_entries_start_as_vectors_far_apart():
    x = jnp.arange(M * O * D, dtype=jnp.float32).reshape(M, O, D)
    for seed in range(5):
        found = np.asarray(draw(x, ENTRIES, jax.random.key(seed)))[:, 0] / D
        stretch = np.arange(ENTRIES + 1) * (M * O) // ENTRIES
        assert (found >= stretch[:-1]).all() and (found < stretch[1:]).all()
    few = np.asarray(draw(x[:1, :3], ENTRIES, jax.random.key(0)))  # 3 vectors for 8 entries
    np.testing.assert_array_equal(np.unique(few[:, 0]), [0, D, 2 * D])


@pytest.fixture(scope="module")
def kernel():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(2, I, O)) * np.exp(0.7 * rng.normal(size=(2, 1, O)))
    w[1, :, 4] = 0
    sizes = (np.exp(1.2 * rng.normal(size=(2, n))) for n in (I, O))
    return jnp.asarray(w, jnp.float32), Stats(*(jnp.asarray(s, jnp.float32) for s in sizes))


@pytest.fixture(scope="module")
def node(kernel):
    return SMALL.init(*kernel, jax.random.key(7))


def weighted_error(w, stats, dense):
    d = [np.asarray(importance(s, 0.5), np.float64) for s in (stats.s_in, stats.s_out)]
    missed = np.asarray(w, np.float64) - np.asarray(dense, np.float64)
    return ((d[0][..., :, None] * d[1][..., None, :] * missed) ** 2).sum((-2, -1))


def test_each_stage_is_kmeans_on_what_the_others_leave(kernel, node):
    w, stats = kernel
    assert node.codes.dtype == jnp.uint8 and node.codes.shape == (2, 2, M, O)
    assert node.codebooks.shape == (2, 2, ENTRIES, D) and node.shape == w.shape
    g = np.maximum(np.sqrt((np.asarray(w, np.float64) ** 2).mean(1)), 1e-4)
    np.testing.assert_allclose(node.g, g, rtol=1e-5)
    keys = jax.random.split(jax.random.key(7), 2)
    d_in, d_out = importance(stats.s_in, 0.5), importance(stats.s_out, 0.5)
    for layer in range(2):
        x = np.pad(np.asarray(w[layer] / node.g[layer][None]), [(0, 2), (0, 0)])
        x = np.stack([x[D * m : D * m + D].T for m in range(M)])
        weight_in = np.pad(np.asarray(d_in[layer]) ** 2, (0, 2)).reshape(M, D)
        weight_out = np.asarray(d_out[layer] * node.g[layer]) ** 2
        for stage, key in enumerate(jax.random.split(keys[layer], 2)):
            start = draw(jnp.asarray(x), ENTRIES, key)
            codes, entries = lloyd64(x, weight_in, weight_out, start, SMALL.iterations)
            np.testing.assert_array_equal(node.codes[layer, stage], codes)
            got = np.asarray(node.codebooks[layer, stage])
            np.testing.assert_allclose(got, entries, rtol=0, atol=2e-5)
            x = x - got[np.asarray(node.codes[layer, stage])]


def test_more_stages_lower_the_error(kernel, node):
    w, stats = kernel
    one, two = (sum(list(node.paths())[:n]) for n in (1, 2))
    first, second = (weighted_error(w, stats, dense) for dense in (one, two))
    assert (second < 0.6 * first).all()
    assert (first < weighted_error(w, stats, 0 * w)).all()


def test_importance_lowers_the_weighted_error(kernel, node):
    w, stats = kernel
    plain = SMALL.init(w, None, jax.random.key(7))
    got, without = (weighted_error(w, stats, n.dense()) for n in (node, plain))
    assert (got < 0.9 * without).all()


def test_keys_are_reproducible_and_each_layer_has_its_own(kernel):
    w = jnp.stack([kernel[0][0]] * 2)
    default, same, other = (SMALL.init(w, None, k) for k in (None, *map(jax.random.key, (0, 1))))
    np.testing.assert_array_equal(default.codebooks, same.codebooks)
    assert (default.codebooks != other.codebooks).any()
    assert (default.codebooks[0] != default.codebooks[1]).any()


def test_one_matrix_needs_no_layer_axis(kernel):
    node = SMALL.init(kernel[0][0])
    assert node.shape == (I, O) and node.codes.shape == (2, M, O)
    assert SMALL.dense(node).shape == (I, O)
    node.pack("w")


def test_a_dead_output_packs_to_almost_nothing(node):
    packed = node.pack("w")
    assert np.isfinite(packed.dense()).all()
    assert np.abs(np.asarray(packed.dense())[1, :, 4]).max() < 1e-3


def test_specs_need_shapes_only():
    w = jax.ShapeDtypeStruct((2, 300, 40), jnp.bfloat16)
    stats = Stats(*(jax.ShapeDtypeStruct((2, n), jnp.float32) for n in (300, 40)))
    node = jax.eval_shape(CodebookSpec().init, w, stats, jax.random.key(0))
    assert node.shape == (2, 300, 40) and node.codes.dtype == jnp.uint8
    assert node.bits_per_weight() == pytest.approx(2 + 16 * (2 * 16 * 4 + 40) / (300 * 40))
    assert jax.eval_shape(CodebookSpec().init, w).shape == (2, 300, 40)


@pytest.mark.parametrize(
    "setting", [{"stages": 0}, {"stages": 9}, {"bits": 0}, {"bits": 9}, {"dim": 0},
                {"iterations": -1}], ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(BadInput, match=f"{name} {value}"):
        CodebookSpec(**setting)
