"""Diagnostics against float64 NumPy on inputs caught at every linear by callbacks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from rabit_jax.errors import BadInput
from rabit_jax.evaluate.diagnostics import diagnose
from rabit_jax.signs.iterative_svid import svid
from rabit_jax.train.sharding import batch_sharding, make_mesh, param_shardings
from rabit_jax.tree import weights_of
from rabit_jax.weights.conversion import pack
from rabit_jax.weights.residual_sign import ResidualSign
from rabit_jax.weights.seam import linear

PROJECTIONS = [f"layers/attn/{n}" for n in "qkvo"]
PROJECTIONS += [f"layers/mlp/{n}" for n in ("gate", "up", "down")]


@struct.dataclass
class Catcher:
    """A kernel whose inputs pass through a callback, with the number of their layer."""

    kernel: jax.Array
    layer: jax.Array
    sink: object = struct.field(pytree_node=False)

    def matmul(self, x):
        same = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(self.sink, same, self.layer, x) @ self.kernel

    def dense(self):
        return self.kernel


@pytest.fixture(scope="module")
def apply(model):
    def apply(params, batch):
        return model.apply({"params": params}, batch["tokens"], batch["mask"], method="features")[0]

    return apply


@pytest.fixture(scope="module")
def catch(apply):
    """`catch(params, batches)` -> `{path: x float64 [l, tokens, i]}` of the real tokens."""

    def catch(params, batches):
        found = {}

        def catcher(path, kernel):
            def sink(layer, x):
                found.setdefault((path, int(layer)), []).append(np.asarray(x, np.float64))
                return x

            return Catcher(kernel, jnp.arange(len(kernel)), sink)

        def wrap(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name.removesuffix("/kernel") not in PROJECTIONS:
                return leaf
            return catcher(name, leaf.dense() if hasattr(leaf, "dense") else leaf)

        wrapped = jax.tree_util.tree_map_with_path(
            wrap, params, is_leaf=lambda a: hasattr(a, "dense")
        )
        for batch in batches:
            jax.block_until_ready(apply(wrapped, batch))
        masks = [batch["mask"] for batch in batches]
        return {
            key: np.concatenate([x[m] for x, m in zip(xs, masks, strict=True)])
            for key, xs in found.items()
        }

    return catch


def corr(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def expected(x, kernel, terms):
    """The four measures of one linear, from their definitions."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    y_t, y = x @ kernel, [x @ np.asarray(term, np.float64) for term in terms]
    rest = [y_t - sum(y[:i], np.zeros_like(y_t)) for i in range(len(y) + 1)]
    later = range(1, len(y))
    covariance = [np.cov(rest[i].ravel(), y[i].ravel()) for i in later]
    return {
        "path_correlation": [corr(a, b) for a, b in itertools.combinations(y, 2)],
        "residual_alignment": [corr(rest[i], y[i]) for i in later],
        "slope": [c[0, 1] / c[1, 1] for c in covariance],
        "relative_mse": [np.sum(rest[-1] ** 2) / np.sum(y_t**2)],
    }


@pytest.mark.parametrize(
    "k, drive", [(1, "teacher"), (2, "teacher"), (3, "teacher"), (2, "student")]
)
def test_against_float64_at_every_linear(apply, catch, teacher, make_student, batches, k, drive):
    student = make_student(teacher, k)
    report = diagnose(apply, teacher, student, batches, drive=drive)
    inputs = catch(teacher if drive == "teacher" else student, batches)
    assert sorted(report["layers"]) == sorted(PROJECTIONS)
    everything = {}
    for path, node in weights_of(student).items():
        block, name = path.split("/")[1:3]
        kernel = teacher["layers"][block][name]["kernel"]
        found = report["layers"][path.removesuffix("/kernel")]
        for layer in range(3):
            terms = [term[layer] for term in node.paths()]
            want = expected(inputs[path, layer], kernel[layer], terms)
            assert len(want["slope"]) == k - 1
            for measure, values in want.items():
                if not values:
                    assert found[measure] is None
                    continue
                mean = np.mean(values)
                assert found[measure][layer] == pytest.approx(mean, rel=2e-5, abs=2e-6)
                everything.setdefault(measure, []).append(mean)
            parts = [("pairs", "path_correlation"), ("alignments", "residual_alignment"),
                     ("slopes", "slope")]
            for part, measure in parts:
                listed = [values[layer] for values in found[part].values()]
                np.testing.assert_allclose(listed, want[measure], rtol=2e-5, atol=2e-6)
    for measure, mean in report["mean"].items():
        assert (mean is None) == (measure not in everything)
        if mean is not None:
            assert mean == pytest.approx(np.mean(everything[measure]), rel=1e-5)


def test_keys_name_pairs_and_paths(apply, teacher, make_student, batches):
    found = diagnose(apply, teacher, make_student(teacher, 3), batches)["layers"]["layers/attn/q"]
    assert list(found["pairs"]) == ["1-2", "1-3", "2-3"]
    assert list(found["alignments"]) == list(found["slopes"]) == ["2", "3"]


def test_padded_tokens_do_not_count(apply, teacher, make_student, batches):
    student = make_student(teacher, 2)
    other = [
        {**batch, "tokens": np.where(batch["mask"], batch["tokens"], 7)} for batch in batches
    ]
    first, second = (diagnose(apply, teacher, student, b) for b in (batches, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, second)


def test_packed_weights_measure_like_their_latents(apply, teacher, make_student, batches):
    student = make_student(teacher, 2)
    want = diagnose(apply, teacher, student, batches, drive="student")
    found = diagnose(apply, teacher, pack(student), batches, drive="student")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-3), found, want)


def test_on_a_mesh(apply, teacher, make_student, batches):
    student = make_student(teacher, 2)
    mesh = make_mesh({"data": 4, "tensor": 2})
    placed = [jax.device_put(p, param_shardings(p, mesh)) for p in (teacher, student)]
    assert "tensor" in str(placed[1]["layers"]["mlp"]["up"]["kernel"].latent.sharding)
    found = diagnose(apply, *placed, batches, batch_sharding=batch_sharding(mesh))
    want = diagnose(apply, teacher, student, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, want)


def one_linear(params, batch):
    return linear(batch["x"], params["w"])


def white(b=8, t=64, i=256, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(b // 2, t, i)).astype(np.float32)
    x = np.concatenate([x, -x])                # every mean is then zero
    return {"x": x, "tokens": np.zeros((b, t), np.int32), "mask": np.ones((b, t), bool)}


def test_gaussian_weight_and_white_inputs_give_the_known_constants():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(256, 256)), jnp.float32)
    fit = jax.jit(functools.partial(svid, k=2, rounds=10, tolerance=0))(w)
    mean = diagnose(one_linear, {"w": w}, {"w": ResidualSign(w, fit.g, fit.h)}, [white()])["mean"]
    assert mean["path_correlation"] == pytest.approx(-0.346, abs=0.015)
    assert mean["residual_alignment"] == pytest.approx(0.839, abs=0.01)
    assert mean["slope"] == pytest.approx(1, abs=0.02)
    assert mean["relative_mse"] == pytest.approx(0.1175, abs=0.004)


def test_published_identities_on_centred_data():
    rng = np.random.default_rng(2)
    w = rng.normal(size=(32, 24)).astype(np.float32)
    g, h = np.array([[0.8], [0.4]]) * np.ones(24), np.exp(0.2 * rng.normal(size=(2, 32)))
    node = ResidualSign(*(jnp.asarray(a, jnp.float32) for a in (w, g, h)))
    batch = white(i=32, seed=3)
    found = diagnose(one_linear, {"w": jnp.asarray(w)}, {"w": node}, [batch])["mean"]
    x = batch["x"].astype(np.float64)
    y_t, y_1, y_2 = x @ w.astype(np.float64), *(x @ np.asarray(p, np.float64) for p in node.paths())
    r_1, mse = y_t - y_1, found["relative_mse"] * np.mean(y_t**2)
    s_1, s_2, s_r = (np.std(a) for a in (y_1, y_2, r_1))
    # |y_t - y_1 - y_2|^2 expanded: C' is all of it but the interaction of the two paths.
    constant = np.mean(y_t**2) + s_1**2 + s_2**2 - 2 * np.mean(y_t * (y_1 + y_2))
    assert mse == pytest.approx(constant + 2 * s_1 * s_2 * found["path_correlation"], rel=1e-4)
    aligned = s_r**2 + s_2**2 - 2 * s_r * s_2 * found["residual_alignment"]
    assert mse == pytest.approx(aligned, rel=1e-4)
    assert found["slope"] == pytest.approx(found["residual_alignment"] * s_r / s_2, rel=1e-4)


def test_a_path_of_zero_scale_has_no_correlation():
    w = jnp.ones((4, 3))
    node = ResidualSign(w, jnp.asarray([[1.0] * 3, [0.0] * 3]), jnp.ones((2, 4)))
    batch = {**white(i=4), "x": np.random.default_rng(0).normal(size=(8, 64, 4)).astype(np.float32)}
    del batch["mask"]
    report = diagnose(one_linear, {"w": w}, {"w": node}, [batch])
    assert report["layers"]["w"]["path_correlation"] == [None]
    assert report["mean"]["slope"] is None
    assert report["mean"]["relative_mse"] == 0


def test_bad_input(apply, model, teacher, make_student, batches):
    student = make_student(teacher, 2)
    empty = [{**batches[0], "mask": np.zeros((4, 9), bool)}]

    def shallow(params, batch):
        return params["embed"]["embedding"][batch["tokens"]]

    cases = [
        ("choose 'teacher' or 'student'", (apply, teacher, student, batches), {"drive": "both"}),
        ("no weight node", (apply, teacher, teacher, batches), {}),
        ("wanted its full-precision kernel", (apply, student, student, batches), {}),
        ("no batch", (apply, teacher, student, []), {}),
        ("no token reached", (apply, teacher, student, empty), {}),
        ("no token reached", (shallow, teacher, student, batches), {}),
    ]
    for message, args, settings in cases:
        with pytest.raises(BadInput, match=message):
            diagnose(*args, **settings)
    flat = {**white(i=4), "mask": np.ones((2, 2), bool)}
    node = ResidualSign(jnp.ones((4, 3)), jnp.ones((1, 3)), jnp.ones((1, 4)))
    with pytest.raises(BadInput, match="batch mask is"):
        diagnose(one_linear, {"w": jnp.ones((4, 3))}, {"w": node}, [flat])
    broken = [{**white(i=4), "x": np.full((8, 64, 4), np.inf, np.float32)}]
    with pytest.raises(BadInput, match="not finite"):
        diagnose(one_linear, {"w": jnp.ones((4, 3))}, {"w": node}, broken)
